"""What the documents say holds: CLI help, links, the file tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = [
    page
    for page in sorted(ROOT.rglob("*.md"))
    if not {".venv", "out", "runs", "node_modules"} & set(page.relative_to(ROOT).parts)
]


def test_cli_page_is_the_commands_own_help():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "cli_docs", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run scripts/cli_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if "results" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    rooms = "trainer|be_serve|benchmarks|tests|scripts|deploy|examples|experiments"
    for name in re.findall(rf"`((?:{rooms})/[\w/.-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_readmes_tree_names_what_there_is():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.split("## Where to read on", 1)[1].split("```text\n", 1)[1].split("```", 1)[0].splitlines()
    assert len(lines) >= 4
    named = []
    for line in lines:
        folders = re.findall(r"(\w+)/", line)
        named += folders
        if len(folders) == 1:  # then its rooms follow
            rooms = line.split("/", 1)[1].rpartition(":")[2].split(";")[0]
            named += [f"{folders[0]}/{room.strip()}" for room in rooms.split(",")]
    for name in named:
        path = ROOT / name
        assert path.exists() or path.with_suffix(".py").exists(), f"README names {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_commands_in_the_readme_exist():
    from be_serve.cli.main import _VERBS

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"(?:^|[`|] ?)be-serve ([a-z][a-z-]+)\b", text, re.MULTILINE)) - {"replaces"}
    unknown = {word for word in used if word not in _VERBS}
    assert {"serve", "bench"} <= used
    assert not unknown, f"README uses be-serve {unknown}"
