"""SHA-256 of bytes, files and values: what names a thing by what it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256(data: bytes) -> str:
    """The digest of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """The digest of a file, which is read in pieces. Raises OSError."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Sixteen hex digits of anything that JSON can hold; the order of keys does not count."""
    return sha256(json.dumps(value, sort_keys=True).encode())[:16]
