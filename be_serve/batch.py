"""OpenAI batch files: every row a request, every answer a row.

Answers are kept in a journal beside the output as they come, so the same call continues
after a stop, whatever stopped it. What is wrong with a row (400, 404, 413, 422) is its
answer; what is wrong with the server (busy, gone, a proxy's word) is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import random
import socket
import stat
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from be_serve.core.errors import BEError, InputError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Where a row may go: the routes that answer with text."""

_ROWS_FAULT = (400, 404, 413, 422)
_BUSY = (408, 429, 502, 503, 504)
_TRIES = 3  # of a row on which the server itself fails, or that it does not answer in time
_LONGEST_WAIT = 10.0  # seconds between two tries
_WRONG_SERVER = "Is it the right URL and key?"
_PATIENCE = 600.0  # seconds without any answer after which a batch is given up


class BatchStopped(BEError):
    """What answers the rows is gone, or answers something else; the answers so far are kept."""

    code = "be_batch_stopped"


@dataclass(frozen=True)
class BatchRow:
    """One request of a batch file."""

    custom_id: str
    url: str
    content: bytes
    """The body, as JSON."""


def read_rows(path: str | Path) -> list[BatchRow]:
    """Read a batch file. Raises InputError naming the line at fault.

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
                    raise InputError(f"{path}, line {number}: the custom_id {row.custom_id!r} was used before.")
                rows[row.custom_id] = row
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"Cannot read the batch file {path}: {exc}.") from exc
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
    return BatchRow(custom_id, str(url), json.dumps(body).encode())


def check_output(output: str | Path, source: str | Path) -> Path:
    """The output's path. Raises InputError where writing it would lose a file, or cannot be done."""
    path = Path(output)
    for taken in (path, _part(path)):
        with contextlib.suppress(OSError):
            if taken.samefile(source):
                raise InputError(f"{taken} is the input: name another output.")
            if not stat.S_ISREG(taken.stat().st_mode):
                raise InputError(f"{taken} is no plain file: name another output.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"Cannot write into {path.absolute().parent}.")
    return path


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _set_aside(path: Path) -> None:
    """Rename a file to a name that no file has."""
    for n in itertools.count():
        aside = path.with_name(f"{path.name}.old{f'.{n}' if n else ''}")
        if not aside.exists():
            path.replace(aside)
            return


class Journal:
    """The answers so far, one a line, in OUTPUT.part; only places and counts are held in memory.

    with Journal(output, rows, {"model": ...}) as journal:
        journal.add(answer)
        journal.write(failed={})

    `made_by` is what the answers depend on besides the rows. Raises InputError where the
    file holds answers to other rows or made by something else, where another process has it
    open, and where `output` exists without a journal. `fresh` sets both aside as *.old, *.old.1, ...
    """

    def __init__(self, output: Path, rows: Sequence[BatchRow], made_by: dict[str, str], *, fresh: bool = False) -> None:
        self.output = output
        self.path = _part(output)
        self.refused = 0
        self.digests: dict[str, set[str]] = {}
        """File digests of the tokens that answered, by id: more than one where a token was replaced meanwhile."""
        self._rows = rows
        self._made_by = made_by
        self._fresh = fresh
        self._places: dict[str, int] = {}
        self._kept = False

    def __enter__(self) -> Journal:
        if not self._fresh and self.output.exists() and not self.path.exists():
            raise InputError(f"{self.output} exists: name another output, or give --fresh to set it aside.")
        try:
            self._file = self._open()
            if self._fresh:
                if self.output.exists():
                    _set_aside(self.output)
                if self._file.seek(0, os.SEEK_END):
                    _set_aside(self.path)
                    self._file.close()
                    self._file = self._open()
        except BlockingIOError as exc:
            raise InputError(f"Another run is writing {self.path}.") from exc
        except OSError as exc:
            raise InputError(f"Cannot write {self.path}: {exc}.") from exc
        try:
            self._take_up()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._places and not self._kept and not self._file.closed:
            self.path.unlink(missing_ok=True)  # nothing is lost, and a corrected command is not refused
        self._file.close()

    def _open(self) -> IO[bytes]:
        """The journal, locked, for its owner's eyes only."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # another run has just finished and removed it

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._places

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer. Raises BatchStopped where the disk takes no more."""
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(answer).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise BatchStopped(f"Cannot write {self.path}: {exc}.") from exc
        self._note(answer, place)

    def write(self, failed: dict[str, dict[str, Any]]) -> None:
        """Write all answers in the rows' order to the output. The journal goes, unless rows failed."""
        made = self.output.with_name(f".{self.output.name}.{uuid.uuid4().hex[:8]}")
        try:
            with made.open("wb") as file:
                for row in self._rows:
                    if row.custom_id in self._places:
                        self._file.seek(self._places[row.custom_id])
                        file.write(self._file.readline())
                    else:
                        file.write(json.dumps(failed[row.custom_id]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.output)
        except OSError as exc:
            made.unlink(missing_ok=True)
            raise InputError(f"Cannot write {self.output}: {exc}. The answers are kept in {self.path}.") from exc
        self._kept = bool(failed)
        if not failed:
            self.path.unlink()
            self._file.close()

    def _take_up(self) -> None:
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps([row.custom_id, row.url]).encode() + row.content)
        head = {"be_serve_batch": "1", "rows": digest.hexdigest(), **self._made_by}
        self._file.seek(0)
        first = self._file.readline()
        found = _object(first) or {}
        if first and "be_serve_batch" not in found:
            raise InputError(f"{self.path} is no journal of a batch: name another output.")
        if found != head:
            if self._file.read(1):
                differs = [name for name in sorted({*head, *found}) if head.get(name) != found.get(name)]
                raise InputError(
                    f"{self.path} holds the answers of a run with other {', '.join(differs)}. Finish that one, name "
                    "another output, or give --fresh to set its answers aside."
                )
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(head).encode() + b"\n")
            self._file.flush()
        while True:
            place = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                if line:
                    self._file.truncate(place)  # a line that a stop cut off
                return
            if answer := _object(line):
                self._note(answer, place)

    def _note(self, answer: dict[str, Any], place: int) -> None:
        self._places[answer["custom_id"]] = place
        self.refused += answer["error"] is not None
        said = answer["response"].get("headers", {})
        ids, digests = said.get("x-be-id", ""), said.get("x-be-digest", "")
        for be_id, digest in zip(ids.split(","), digests.split(","), strict=False):
            if be_id and digest:
                self.digests.setdefault(be_id.strip(), set()).add(digest.strip())


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


@asynccontextmanager
async def connect(
    url: str,
    *,
    key: str | None = None,
    concurrency: int = 64,
    timeout: float | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client for the server at `url`; `timeout` in seconds bounds each answer. Raises InputError for a bad URL."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as exc:
        raise InputError("--url is no URL.") from exc
    if parsed.userinfo:
        raise InputError("--url holds a name or password: give the server's key by VLLM_API_KEY.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("--url must begin with http:// or https://.")
    headers = {}
    if key and (key := key.strip()):
        if not key.isascii() or not key.isprintable():
            raise InputError("The server's key holds characters that no HTTP header can carry.")
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    # A server that lost its power answers no more; without this a worker would wait for it for ever.
    alive = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    async with httpx.AsyncClient(
        base_url=str(parsed).rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(timeout, connect=10.0),
        transport=transport or httpx.AsyncHTTPTransport(limits=limits, socket_options=alive),
        trust_env=False,  # prompts and keys go to the server, and not by a proxy of the environment
    ) as client:
        yield client


async def served_models(client: httpx.AsyncClient) -> str:
    """The base models of a server, for a journal's `made_by`. Raises BatchStopped where it does not say."""
    try:
        answer = await client.get("/v1/models")
    except httpx.RequestError as exc:
        raise BatchStopped(f"The server does not answer: {type(exc).__name__} {exc}".rstrip()) from exc
    found = (_object(answer.content) or {}).get("data")
    if not answer.is_success or not isinstance(found, list):
        raise BatchStopped(f"GET /v1/models answered {answer.status_code}: {_message(answer)} {_WRONG_SERVER}")
    models = [one for one in found if isinstance(one, dict) and not one.get("parent")]
    return ", ".join(sorted(f"{one.get('id')} ({one.get('root')})" for one in models))


@dataclass
class _Clock:
    """When anything was last answered, by any row."""

    patience: float
    at: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        self.at = time.monotonic()

    def out(self, since: float) -> bool:
        """Whether nothing was answered for so long, of which the row that asks was in trouble all the time."""
        return time.monotonic() - max(self.at, since) > self.patience


async def run_rows(
    client: httpx.AsyncClient,
    rows: Sequence[BatchRow],
    journal: Journal,
    *,
    concurrency: int = 64,
    alive: Callable[[], bool] = lambda: True,
    done: Callable[[], object] = lambda: None,
    patience: float = _PATIENCE,
) -> dict[str, dict[str, Any]]:
    """Ask for every row that the journal does not hold, `concurrency` at a time.

    A busy or absent server is asked again for as long as any row is answered now and then.
    Returns the rows that failed: three times 500 or no answer in time, or another status that the row
    alone meets; a further run asks them again. Raises BatchStopped where nothing was answered for
    `patience` seconds, where `alive` says no, and where it is the wrong server or key.
    """
    waiting = iter([row for row in rows if row.custom_id not in journal])
    failed: dict[str, dict[str, Any]] = {}
    clock = _Clock(patience)

    async def work() -> None:
        for row in waiting:
            answer, final = await _ask(client, row, clock, alive, lambda: len(journal) > 0)
            if final:
                journal.add(answer)
                clock.tick()
            else:
                failed[row.custom_id] = answer
            done()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    except BatchStopped as exc:
        kept = f"{len(journal)} answers are kept in {journal.path}" if len(journal) else "There were no answers yet"
        raise BatchStopped(f"{exc} {kept}: the same command, without --fresh, goes on from there.") from exc
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return failed


async def _ask(
    client: httpx.AsyncClient, row: BatchRow, clock: _Clock, alive: Callable[[], bool], proven: Callable[[], bool]
) -> tuple[dict[str, Any], bool]:
    """One row's answer, as a row of the output, and whether it is final. `proven`: others were answered before."""
    wait, broken = 0.5, 0
    since: float | None = None
    while True:
        answer, named = None, ""
        try:
            answer = await client.post(row.url, content=row.content, headers={"Content-Type": "application/json"})
        except httpx.RequestError as exc:
            why = f"The server does not answer: {type(exc).__name__} {exc}".rstrip() + "."
            broken += isinstance(exc, httpx.ReadTimeout | httpx.DecodingError)
        else:
            status, body = answer.status_code, _object(answer.content)
            if (answer.is_success and body is not None) or _is_rows_fault(answer):
                return _as_row(row, answer), True
            why = f"The server answered {status}: {_message(answer)}"
            broken += status in (httpx.codes.INTERNAL_SERVER_ERROR, httpx.codes.GATEWAY_TIMEOUT)
            if status not in (*_BUSY, httpx.codes.INTERNAL_SERVER_ERROR):
                if not proven() or status == httpx.codes.UNAUTHORIZED or not answer.is_error:
                    where = answer.headers.get("location")
                    raise BatchStopped(f"{why}{f' (it points to {where})' if where else ''} {_WRONG_SERVER}")
                return _as_row(row, answer), False
            named = answer.headers.get("retry-after", "")
        if not alive():
            raise BatchStopped("The server ended; its log above says why.")
        if broken == _TRIES:
            return (_as_row(row, answer) if answer is not None else _unanswered(row, why)), False
        since = since or time.monotonic()
        if clock.out(since):
            raise BatchStopped(f"Nothing was answered for {clock.patience:.0f} s. {why}")
        pause = min(float(named) if named.isdigit() else wait, _LONGEST_WAIT)
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
        wait *= 2


def _is_rows_fault(answer: httpx.Response) -> bool:
    """Whether a refusal is about the row, and not a route that this server does not have."""
    if answer.status_code == httpx.codes.NOT_FOUND and _message(answer) in ("Not Found", ""):
        return False
    return answer.status_code in _ROWS_FAULT and _object(answer.content) is not None


def _message(answer: httpx.Response) -> str:
    body = _object(answer.content) or {}
    error = body.get("error", body.get("detail", ""))
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:500]


def _unanswered(row: BatchRow, why: str) -> dict[str, Any]:
    error = {"code": "no_answer", "message": why}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": None, "error": error}


def _as_row(row: BatchRow, answer: httpx.Response) -> dict[str, Any]:
    body = _object(answer.content)
    if body is None:
        body = {"error": {"message": answer.text[:2000], "code": answer.status_code}}
    response = {
        "status_code": answer.status_code,
        "request_id": answer.headers.get("x-request-id") or body.get("id") or f"be-{uuid.uuid4().hex}",
        "body": body,
    }
    if said := {name: value for name, value in answer.headers.items() if name.startswith("x-be-")}:
        response["headers"] = said  # such as that the full prompt stood in for a token
    fault = body.get("error", body) if answer.is_error else None
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": response, "error": fault}
