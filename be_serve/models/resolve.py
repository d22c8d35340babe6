"""A model's name to the folder that holds its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from be_serve.core.errors import InputError
from be_serve.core.redaction import hide
from be_serve.models.builtin import BUILTIN, prepare_builtin

_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model as the user named it, and the folder with its files."""

    name: str
    path: Path
    revision: str | None = None


def be_home() -> Path:
    """The user's cache folder for prepared models: `$BE_HOME`, or the platform's own."""
    return Path(os.environ.get("BE_HOME") or platformdirs.user_cache_dir("be-serve")).expanduser()


def resolve_model(name: str, *, revision: str | None = None) -> ResolvedModel:
    """Find a model's folder, preparing a `builtin:` one on first use.

    A Hugging Face name is downloaded by huggingface_hub under its own settings
    (cache, `HF_HUB_OFFLINE`). Raises InputError where nothing can be found.
    """
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise InputError(f"Unknown built-in model {name!r}; there is: {', '.join(BUILTIN)}.")
        return ResolvedModel(name, prepare_builtin(name, be_home()))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ResolvedModel(name, folder.resolve())
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f"No folder {hide(name)!r}; for a Hugging Face name install the extra [train] or [serve]."
        ) from None
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except Exception as exc:  # the hub's errors share no base class
        raise InputError(f"No local folder {hide(name)!r}, and the Hugging Face hub gave: {hide(str(exc))}") from None
    # .../snapshots/<commit>: the commit that was really taken.
    return ResolvedModel(name, path, path.name if path.parent.name == "snapshots" else revision)
