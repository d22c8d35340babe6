"""deploy/ agrees with the code and the install script: no engine runs here that would build the images."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
INSTALL = (ROOT / "scripts" / "install").read_text(encoding="utf-8")
ACCELS = ["cpu", "cuda"]
SERVICES = {"cpu": "server", "cuda": "server-cuda"}
PORT = "8000"
UID = "10001"


class Dockerfile:
    """The instructions of a Dockerfile, continued lines joined, comments dropped."""

    def __init__(self, accel: str) -> None:
        text = (ROOT / "deploy" / f"Dockerfile.{accel}").read_text(encoding="utf-8")
        text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        text = re.sub(r"\\\n\s*", " ", text)
        self.steps = [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]

    def all(self, instruction: str) -> list[str]:
        return [rest for name, rest in self.steps if name == instruction]

    def last(self, instruction: str) -> str:
        return self.all(instruction)[-1]

    @property
    def env(self) -> dict[str, str]:
        return dict(word.split("=", 1) for rest in self.all("ENV") for word in shlex.split(rest))

    @property
    def runs(self) -> list[str]:
        """RUN lines without their mounts."""
        return [re.sub(r"--mount=\S+\s+", "", rest) for rest in self.all("RUN")]


@pytest.fixture(params=ACCELS)
def accel(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dockerfile(accel: str) -> Dockerfile:
    return Dockerfile(accel)


@pytest.fixture
def service(accel: str) -> dict[str, Any]:
    return COMPOSE["services"][SERVICES[accel]]


def default_of(text: str) -> str:
    """What compose puts for `${NAME:-default}`."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_python_is_one_that_pyproject_allows_and_the_tests_ran_on(dockerfile: Dockerfile) -> None:
    (base,) = dockerfile.all("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", base)
    assert version, base
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version[1]}.0")
    for bound in re.findall(r"\d+", PROJECT["requires-python"])[1::2]:
        assert f"(3, {bound})" in INSTALL, "scripts/install and pyproject.toml differ about Python"


def test_packages_come_from_the_install_script_and_its_lock(accel: str, dockerfile: Dockerfile) -> None:
    assert dockerfile.env["BE_ACCEL"] == accel
    assert f"requirements/{accel}.lock requirements/{accel}.lock" in dockerfile.all("COPY")
    assert "scripts/install deps" in dockerfile.runs
    assert "scripts/install project" in dockerfile.runs
    assert not [run for run in dockerfile.runs if re.search(r"\b(pip|uv)\b", run)], "use scripts/install"
    assert "all | deps | project)" in INSTALL
    assert "LOCK=requirements/$ACCEL.lock" in INSTALL
    assert "${BE_ACCEL:-}" in INSTALL


def test_all_that_the_install_needs_is_copied_before_it(dockerfile: Dockerfile) -> None:
    position = {step: number for number, step in enumerate(dockerfile.steps)}
    run = {rest.split()[-1]: number for (name, rest), number in position.items() if name == "RUN"}
    packages = {name.removesuffix("*") for name in _packages()}
    for source in ["pyproject.toml", "scripts/install"]:
        assert any(rest.startswith(source) and position[n, rest] < run["deps"] for n, rest in position if n == "COPY")
    for source in [PROJECT["readme"], *packages]:
        copies = [position[n, rest] for n, rest in position if n == "COPY" and source in rest.split()[:-1]]
        assert copies, f"{source} is not copied"
        assert max(copies) < run["project"]


def _packages() -> list[str]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    return tool["setuptools"]["packages"]["find"]["include"]


def test_every_copied_path_exists_and_is_in_the_build_context(dockerfile: Dockerfile) -> None:
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = [line[1:] for line in context if line.startswith("!")]
    for rest in dockerfile.all("COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert any(source == path or source.startswith(f"{path}/") for path in kept), f"{source} is ignored"


def test_image_runs_the_console_script_as_a_fixed_user(dockerfile: Dockerfile) -> None:
    assert dockerfile.last("ENTRYPOINT") == '["be-serve"]'
    assert "be-serve" in PROJECT["scripts"]
    assert dockerfile.env["PATH"].startswith(f"{dockerfile.last('WORKDIR')}/.venv/bin:")
    assert "VENV=.venv\n" in INSTALL
    assert dockerfile.last("USER") == f"{UID}:{UID}"
    assert any(f"useradd --uid {UID} " in run for run in dockerfile.runs)
    user, entry = (next(i for i, (n, _) in enumerate(dockerfile.steps) if n == name) for name in ("USER", "ENTRYPOINT"))
    assert user < entry
    assert "RUN" not in [name for name, _ in dockerfile.steps[user:]]


def test_command_is_one_that_the_server_takes(accel: str, dockerfile: Dockerfile, service: dict[str, Any]) -> None:
    from be_serve.cli.main import _VERBS
    from be_serve.models import DEFAULT_MODEL

    image = yaml.safe_load(dockerfile.last("CMD"))
    composed = [default_of(word) for word in service["command"]]
    assert image[:2] == composed[:2] == ["serve", DEFAULT_MODEL]
    assert "serve" in _VERBS
    joined = [" ".join(image).replace("=", " "), " ".join(composed).replace("=", " ")]
    for command in joined:
        assert f"--port {PORT}" in command
        assert "--host 0.0.0.0" in command
        assert ("--enforce-eager" in command) == (accel == "cpu")


def test_paths_and_ports_agree(dockerfile: Dockerfile, service: dict[str, Any]) -> None:
    assert dockerfile.last("EXPOSE") == PORT
    assert [default_of(port) for port in service["ports"]] == [f"127.0.0.1:{PORT}:{PORT}"]
    volumes = dict(entry.split(":") for entry in service["volumes"])
    assert set(volumes) == set(COMPOSE["volumes"]), "a volume is not named"
    assert volumes["registry"] == "/var/lib/be-serve"
    registry = dockerfile.env["BE_REGISTRY"]
    assert registry == default_of(service["environment"]["BE_REGISTRY"]) == "sqlite:////var/lib/be-serve/registry.db"
    for name in ("BE_HOME", "HF_HOME", "VLLM_CACHE_ROOT"):
        assert dockerfile.env[name].startswith(volumes["cache"]), name
    made = next(run for run in dockerfile.runs if "install --directory" in run)
    assert all(path in made for path in volumes.values()), "a volume would belong to root"


def test_environment_names_are_those_the_code_reads(dockerfile: Dockerfile, service: dict[str, Any]) -> None:
    from be_serve.serving.settings import Settings

    settings = Settings.from_env({"BE_REGISTRY": dockerfile.env["BE_REGISTRY"], "BE_ADMIN_KEY": "k"})
    assert settings.registry == dockerfile.env["BE_REGISTRY"]
    assert settings.admin_key == "k"
    source = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "be_serve").rglob("*.py") if "tests" not in path.parts
    )
    for name in {*dockerfile.env, *service["environment"]} - {"BE_ACCEL"}:  # BE_ACCEL is the install script's
        if name.startswith("BE_"):
            assert f'"{name}"' in source, f"nothing reads {name}"
    assert service["environment"]["BE_ADMIN_KEY"].startswith("${BE_ADMIN_KEY:?"), "must not start without a key"
    assert "BE_ADMIN_KEY" not in dockerfile.env, "a key does not belong into an image"


def test_service_is_confined(service: dict[str, Any]) -> None:
    assert service["user"] == f"{UID}:{UID}"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert any(entry.startswith("/tmp:") and "exec" in entry for entry in service["tmpfs"])


def test_health_check_asks_a_route_that_needs_no_key(service: dict[str, Any]) -> None:
    kind, program, flag, code = service["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python", "-c")
    assert f"http://127.0.0.1:{PORT}/health" in code
    compile(code, "healthcheck", "exec")


def test_compose_builds_from_these_files(accel: str, service: dict[str, Any]) -> None:
    context = (ROOT / "deploy" / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).name == f"Dockerfile.{accel}"
    assert (service.get("profiles") == ["cuda"]) == (accel == "cuda"), "one server starts by default"


def test_readme_documents_every_setting_of_compose() -> None:
    text = (ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8")
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    for name, default in set(re.findall(r"\$\{(\w+):-([^}]*)\}", text)):
        assert f"| `{name}` |" in readme, name
        assert not default or f"`{default}`" in readme, f"{name}: the default is {default}"


def test_stated_sizes_are_the_same_everywhere() -> None:
    sizes = {
        "cpu": re.search(r'size="about ([\d.]+ GB), [\d.]+ GB on disk"\n\s+"\$VENV', INSTALL),
        "cuda": re.search(r'cuda\) size="about ([\d.]+ GB),', INSTALL),
    }
    readme = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    for accel, found in sizes.items():
        assert found
        row = next(line for line in readme.splitlines() if f"`be-serve:{accel}`" in line)
        assert f"about {found[1]}" in row
