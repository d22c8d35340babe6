"""Reads a system prompt from a file, and computes the digest that identifies it."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

from be_serve.core.errors import InputError

_MAX_MARKS = 30
"""Largest number of combining marks in a row. Source: UAX #15, Stream-Safe Text Format."""


@cache
def _long_run_of_marks() -> re.Pattern[str]:
    """A pattern for more than `_MAX_MARKS` characters in a row whose decomposition begins with a combining mark."""
    decomposed = ((chr(i), unicodedata.normalize("NFD", chr(i))) for i in range(sys.maxunicode + 1))
    marks = "".join(re.escape(char) for char, parts in decomposed if unicodedata.combining(parts[0]))
    return re.compile(f"[{marks}]{{{_MAX_MARKS + 1}}}")


def prompt_sha256(text: str) -> str:
    """SHA-256 (hex) of the prompt in NFC, without trailing white space.

    `register --match` treats two texts with the same digest as the same prompt. A text with more than 30
    combining marks in a row is not normalised: sorting n marks takes n^2 steps, and no language has such a word.
    """
    unchanged = text.isascii() or _long_run_of_marks().search(text)
    normal = text if unchanged else unicodedata.normalize("NFC", text)
    return hashlib.sha256(normal.rstrip().encode("utf-8", "surrogatepass")).hexdigest()


def read_prompt_file(path: str | Path) -> str:
    """The text of a prompt file (UTF-8), without trailing white space.

    Raises InputError for a missing, undecodable or empty file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8").rstrip()
    except OSError as exc:
        raise InputError(f"Cannot read the prompt file {path}: {exc.strerror}.") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"The prompt file {path} is not UTF-8 text ({exc}). Convert the file to UTF-8.") from exc
    if not text:
        raise InputError(f"The prompt file {path} is empty. Write the system prompt into it.")
    return text
