"""Converts a GGUF file to a Hugging Face folder in the user's cache, once for each content of the file.

vLLM and the trainer read Hugging Face folders. A folder of the same weights also gives trainer and
server the same fingerprint, tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from be_serve.core.errors import InputError
from be_serve.core.redaction import hide

# `-P` keeps the current folder out of the module path, so that a file torch.py in it cannot run.
ISOLATED = ("-P",)
_MAGIC = b"GGUF"
_RECIPE = 1  # version of the conversion; increase it when the conversion changes, so that old folders are not used
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


def is_gguf(name: str) -> bool:
    """Whether a model's name names a GGUF file."""
    return name.lower().endswith(".gguf")


def prepare_gguf(file: Path, home: Path) -> Path:
    """The folder of a GGUF file's weights in bfloat16. Converts the file on first use.

    The folder's name holds the SHA-256 of the file's bytes. Several processes may call it at once: one
    converts, the others wait. The folder appears with one rename, so an interrupted conversion leaves no
    partial folder. Raises InputError if the file is no whole GGUF file, or if the conversion fails.
    """
    digest = _digest(file)
    stem = re.sub(r"[^a-z0-9.]+", "-", file.stem.lower()).strip("-.")[:64] or "model"
    target = home / "models" / f"{stem}-{digest[:12]}-r{_RECIPE}"
    about = f"Converting {file.name} ({file.stat().st_size / 1e9:.1f} GB) to bfloat16 in {target} (once)."
    return made_once(target, about, lambda work: convert_apart(file, work / "model", file.name))


def made_once(target: Path, about: str, make: Callable[[Path], None]) -> Path:
    """The model folder `target`; if it is missing, `make` writes `model` in a work folder, which then becomes it.

    Several processes may call it at once: one makes the folder, the others wait. `about` is printed before.
    """
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "config.json").exists():
            return target
        print(about, file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".preparing-") as work:
            make(Path(work))
            os.replace(Path(work) / "model", target)
    return target


def convert_apart(gguf: Path, out: Path, name: str) -> None:
    """Convert a GGUF file to a folder in a process of its own. Raises InputError with the converter's last lines.

    The caller need not import torch, and the memory is freed afterwards.
    """
    command = [sys.executable, *ISOLATED, "-m", "be_serve.models.convert", str(gguf), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # noqa: S603
    if done.returncode != 0:
        raise InputError(
            f"Converting {name} failed. Install the extra [train], or read the converter's output:\n"
            f"{hide(done.stderr.strip())[-2000:]}"
        )


def _digest(file: Path) -> str:
    """SHA-256 (hex) of a GGUF file. Raises InputError if it is missing, a part of a model, or no GGUF file."""
    if _PART.search(file.name):
        raise InputError(
            f"{file.name} is one part of a model. Join the parts first: llama-gguf-split --merge FIRST OUT."
        )
    try:
        with file.open("rb") as handle:
            if handle.read(len(_MAGIC)) != _MAGIC:
                raise InputError(f"{file} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}.")
            handle.seek(0)
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as exc:
        raise InputError(f"Cannot read the model {file}: {exc.strerror or exc}.") from exc
