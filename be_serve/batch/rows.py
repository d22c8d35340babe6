"""Reads the rows of a batch file. Each row is a request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from be_serve.core.errors import InputError
from be_serve.core.names import field_near

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""The routes that a row may name. They answer with text."""


@dataclass(frozen=True)
class BatchRow:
    """One request of a batch file."""

    custom_id: str
    url: str
    content: bytes
    """The body of the request, as JSON."""


def read_rows(path: str | Path) -> list[BatchRow]:
    """The rows of a batch file. Raises InputError, which names the faulty line.

    A row: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    """
    rows: dict[str, BatchRow] = {}
    try:
        with Path(path).open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = _row(json.loads(line))
                except (ValueError, RecursionError) as exc:
                    raise InputError(f"{path}, line {number}: {exc}") from exc
                if row.custom_id in rows:
                    raise InputError(
                        f"{path}, line {number}: the custom_id {row.custom_id!r} was used before. Choose another one."
                    )
                rows[row.custom_id] = row
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"Cannot read the batch file {path}: {exc}.") from exc
    if not rows:
        raise InputError(f"{path} holds no requests. Write one request per line, as JSON.")
    return list(rows.values())


def _row(found: object) -> BatchRow:
    if not isinstance(found, dict):
        raise ValueError("a row must be a JSON object.")
    custom_id, url, body = found.get("custom_id"), found.get("url"), found.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError("`custom_id` must be a string.")
    if str(found.get("method", "POST")).upper() != "POST":
        raise ValueError("`method` must be POST.")
    if url not in URLS:
        raise ValueError(f"`url` must be one of {', '.join(URLS)}.")
    if not isinstance(body, dict):
        raise ValueError("`body` must be a JSON object.")
    if slip := next((field for key in found if (field := field_near(key))), None):
        raise ValueError(f"`{slip}` is not read here; put it into `body`.")
    if body.get("stream") or body.get("background"):
        raise ValueError("a batch needs complete answers: leave out `stream` and `background`.")
    return BatchRow(custom_id, str(url), json.dumps(body).encode())
