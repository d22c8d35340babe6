"""A system prompt as text: how it is read, normalised and recognised."""

from __future__ import annotations

import hashlib
import unicodedata
from pathlib import Path

from be_serve.core.errors import InputError


def prompt_sha256(text: str) -> str:
    """SHA-256 (hex) of the prompt in NFC without trailing white space.

    Two texts with one digest are the same prompt to `register --match`.
    """
    return hashlib.sha256(unicodedata.normalize("NFC", text).rstrip().encode()).hexdigest()


def read_prompt_file(path: str | Path) -> str:
    """Read a prompt file (UTF-8) and strip its trailing white space.

    Raises InputError for a missing, undecodable or empty file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except OSError as exc:
        raise InputError(f"Cannot read the prompt file {path}: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"The prompt file {path} is not UTF-8 text ({exc}).") from exc
    if not text:
        raise InputError(f"The prompt file {path} is empty.")
    return text
