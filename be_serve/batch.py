"""OpenAI batch files: every row a request, every answer a row, whatever answers them.

The rows go through an httpx client, so the same code feeds a server behind a URL and an
app in this process. Answers are kept as they come: the same call continues after a stop.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import BEError, InputError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Where a row may go: the routes that answer with text."""

_BUSY = (429, 503)
_TRIES = 12
_LONGEST_WAIT = 30.0  # seconds
_NO_TIMEOUT = httpx.Timeout(None, connect=10.0)  # an answer may take as long as it takes


class BatchStopped(BEError):
    """What answered the rows is gone; the answers so far are kept."""

    code = "be_batch_stopped"


@dataclass(frozen=True)
class BatchRow:
    """One request of a batch file."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_rows(path: str | Path) -> list[BatchRow]:
    """Read a batch file. Raises InputError naming the line at fault.

    A row: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"Cannot read the batch file {path}: {exc}.") from exc
    rows: dict[str, BatchRow] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _row(json.loads(line))
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{path}, line {number}: {exc}") from exc
        if row.custom_id in rows:
            raise InputError(f"{path}, line {number}: the custom_id {row.custom_id!r} was used before.")
        rows[row.custom_id] = row
    if not rows:
        raise InputError(f"{path} holds no requests.")
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
    if body.get("stream") or body.get("background"):
        raise ValueError("a batch waits for whole answers: leave out `stream` and `background`.")
    return BatchRow(custom_id, str(url), body)


@dataclass
class Journal:
    """The answers so far, in a file beside the output, one line each as they come."""

    path: Path
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, output: Path, rows: Sequence[BatchRow], target: str) -> Journal:
        """Take up the journal of `output`, or begin one. Raises InputError where it is another batch's."""
        named = json.dumps([target, [[row.custom_id, row.url, row.body] for row in rows]])
        head = {"batch": hashlib.sha256(named.encode()).hexdigest()}
        journal = cls(output.with_name(f"{output.name}.part"))
        try:
            kept = journal.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            journal._append(head)
            return journal
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"Cannot read {journal.path}: {exc}.") from exc
        whole = kept[:-1]  # a line that a stop cut off has no end
        if not whole or _object(whole[0]) != head:
            raise InputError(
                f"{journal.path} holds answers to another file, or by another model: finish that batch, "
                "or give --fresh to forget them."
            )
        for line in whole[1:]:
            answer = _object(line)
            if answer:
                journal.answers[answer["custom_id"]] = answer
        if kept[-1]:
            write_atomically(journal.path, "".join(f"{line}\n" for line in whole).encode())
        return journal

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer."""
        self.answers[answer["custom_id"]] = answer
        self._append(answer)

    def close(self, output: Path, rows: Sequence[BatchRow], failed: dict[str, dict[str, Any]]) -> None:
        """Write all answers in the rows' order to `output`, and drop the journal."""
        every = {**failed, **self.answers}
        write_atomically(output, "".join(f"{json.dumps(every[row.custom_id])}\n" for row in rows).encode())
        self.path.unlink()

    def _append(self, line: dict[str, Any]) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
        except OSError as exc:
            raise InputError(f"Cannot write {self.path}: {exc}.") from exc


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@asynccontextmanager
async def connect(
    url: str, *, asgi: Any = None, key: str | None = None, concurrency: int = 64
) -> AsyncIterator[httpx.AsyncClient]:
    """A client for the server at `url`, or for an app in this process."""
    transport = httpx.ASGITransport(app=asgi, raise_app_exceptions=False) if asgi is not None else None
    limits = httpx.Limits(max_connections=concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        made = httpx.AsyncClient(
            base_url=url.rstrip("/").removesuffix("/v1"),
            transport=transport,
            headers=headers,
            limits=limits,
            timeout=_NO_TIMEOUT,
        )
    except httpx.InvalidURL as exc:
        raise InputError(f"--url {url!r} is no URL: {exc}.") from exc
    async with made as client:
        yield client


async def run_rows(
    client: httpx.AsyncClient,
    rows: Sequence[BatchRow],
    journal: Journal,
    *,
    concurrency: int = 64,
    alive: Callable[[], bool] = lambda: True,
    done: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Ask for every row that the journal does not hold, `concurrency` at a time.

    Answers of the server, refusals too, are kept in the journal. Returns the rows that the server
    failed on (500 and above, or still busy after all tries): they are not kept, so a further run asks them
    again. Raises BatchStopped where nothing answers any more.
    """
    waiting = iter([row for row in rows if row.custom_id not in journal.answers])
    failed: dict[str, dict[str, Any]] = {}

    async def work() -> None:
        for row in waiting:
            answer = await _ask(client, row)
            status = answer["response"]["status_code"]
            if not alive():
                raise BatchStopped(_stopped("The engine died; its log above says why.", journal))
            if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in _BUSY:
                failed[row.custom_id] = answer
            else:
                journal.add(answer)
            done()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as raised:
        first = raised.exceptions[0]
        if isinstance(first, httpx.TransportError):
            raise BatchStopped(_stopped(f"The server does not answer: {first!r}.", journal)) from first
        raise first from None
    return failed


def _stopped(why: str, journal: Journal) -> str:
    return f"{why} {len(journal.answers)} answers are kept in {journal.path}: the same command goes on from there."


async def _ask(client: httpx.AsyncClient, row: BatchRow) -> dict[str, Any]:
    """One row's answer, as a row of the output. A busy server is asked again, and again."""
    content = json.dumps(row.body).encode()
    wait = 0.5
    for tries_left in reversed(range(_TRIES)):
        answer = await client.post(row.url, content=content, headers={"Content-Type": "application/json"})
        if answer.status_code not in _BUSY or not tries_left:
            break
        named = answer.headers.get("retry-after", "")
        await asyncio.sleep(min(float(named) if named.isdigit() else wait, _LONGEST_WAIT))
        wait *= 2
    try:
        body = answer.json()
    except ValueError:
        body = {"error": {"message": answer.text, "code": answer.status_code}}
    named_id = body.get("id") if isinstance(body, dict) else None
    fault = None
    if answer.is_error:
        fault = body.get("error", body) if isinstance(body, dict) else body
    response = {
        "status_code": answer.status_code,
        "request_id": answer.headers.get("x-request-id") or named_id or f"be-{uuid.uuid4().hex}",
        "body": body,
    }
    if said := {name: value for name, value in answer.headers.items() if name.startswith("x-be-")}:
        response["headers"] = said  # such as that the full prompt stood in for a token
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": response, "error": fault}


def check_output(output: str | Path, *, fresh: bool) -> Path:
    """The output's path. Raises InputError where a file would be lost or cannot be written."""
    path = Path(output)
    if fresh:
        path.with_name(f"{path.name}.part").unlink(missing_ok=True)
    elif path.exists():
        raise InputError(f"{path} exists: name another output, or give --fresh to write it anew.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"Cannot write into {path.absolute().parent}.")
    return path
