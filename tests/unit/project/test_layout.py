"""The shape of the packages: what a process loads, how much a folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
MOST_MODULES = 16
"""In one folder: what a reader still takes in at a glance. be_serve/cli has one for each verb."""


def test_no_folder_is_crowded():
    counts = {
        str(folder.relative_to(ROOT)): len([file for file in folder.glob("*.py") if file.name != "__init__.py"])
        for package in ("be_serve", "trainer", "benchmarks")
        for folder in [ROOT / package, *(found for found in (ROOT / package).rglob("*") if found.is_dir())]
    }
    assert counts.pop("be_serve/cli") > 0
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_the_general_plugin_brings_no_registry_into_an_engine():
    """vLLM calls it in its workers, too, where a database driver has no business."""
    code = (
        "import sys; from be_serve.serving.general_plugin import register; register(); "
        "print(sorted(name for name in sys.modules if name.startswith(('be_serve.', 'sqlalchemy'))))"
    )
    env = {**os.environ, "VLLM_PLUGINS": "be_serve"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.strip().splitlines()[-1]
    assert "be_serve.serving.vllm.engine" in loaded  # it did its work
    assert "sqlalchemy" not in loaded
    assert "be_serve.registry" not in loaded
