"""A system prompt as text: how it is read, normalised and recognised."""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

from be_serve.core.errors import InputError

_MOST_MARKS = 30
"""UAX #15, Stream-Safe Text Format."""


@cache
def _long_run_of_marks() -> re.Pattern[str]:
    """More marks in a row than any language needs: characters that begin, taken apart, with a combining one."""
    apart = ((chr(i), unicodedata.normalize("NFD", chr(i))) for i in range(sys.maxunicode + 1))
    marks = "".join(re.escape(one) for one, parts in apart if unicodedata.combining(parts[0]))
    return re.compile(f"[{marks}]{{{_MOST_MARKS + 1}}}")


def prompt_sha256(text: str) -> str:
    """SHA-256 (hex) of the prompt in NFC without trailing white space.

    Two texts with one digest are the same prompt to `register --match`. A text with more than 30 combining
    marks in a row is taken as it is: to put n of them in order takes n^2 steps, and no language has such a word.
    """
    as_it_is = text.isascii() or _long_run_of_marks().search(text)
    normal = text if as_it_is else unicodedata.normalize("NFC", text)
    return hashlib.sha256(normal.rstrip().encode("utf-8", "surrogatepass")).hexdigest()


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
