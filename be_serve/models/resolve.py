"""Finds the folder of a model by its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from be_serve.core.errors import InputError
from be_serve.core.redaction import hide
from be_serve.models.builtin import BUILTIN, prepare_builtin
from be_serve.models.gguf import is_gguf, prepare_gguf

_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class ResolvedModel:
    """The name of a model as the user gave it, and the folder with the model's files."""

    name: str
    path: Path
    revision: str | None = None


def be_home() -> Path:
    """The user's cache folder for converted models and the registry: `$BE_HOME`, or the platform's cache folder."""
    return Path(os.environ.get("BE_HOME") or platformdirs.user_cache_dir("be-serve")).expanduser()


def resolve_model(name: str, *, revision: str | None = None) -> ResolvedModel:
    """The folder of a model. Prepares a `builtin:` model, and converts a `.gguf` file, on first use.

    huggingface_hub downloads a Hugging Face name, with its own settings
    (cache, `HF_HUB_OFFLINE`). Raises InputError if the model cannot be found.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise InputError(f"Unknown built-in model {name!r}; use one of: {', '.join(BUILTIN)}.")
        return ResolvedModel(name, prepare_builtin(name, be_home()))
    folder = Path(name).expanduser()
    if is_gguf(name) and not folder.is_dir():
        return ResolvedModel(name, prepare_gguf(folder, be_home()))
    if folder.is_dir():
        return ResolvedModel(name, folder.resolve())
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"There is no folder {hide(name)!r}; for a Hugging Face name install the extra [train] or [serve]."
        ) from None
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except Exception as exc:  # the hub's errors share no base class
        raise InputError(
            f"There is no folder {hide(name)!r}, and the Hugging Face hub answered: {hide(str(exc))}"
        ) from None
    # The path ends in snapshots/<commit>: the commit that was downloaded.
    return ResolvedModel(name, path, path.name if path.parent.name == "snapshots" else revision)
