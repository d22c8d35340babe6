"""Ask a server for each row, through its busy times and its absences."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from be_serve.batch.journal import Journal, json_object
from be_serve.batch.rows import BatchRow
from be_serve.core.addresses import warn_of_clear_text
from be_serve.core.errors import BatchStopped, InputError
from be_serve.core.redaction import hide, safe_url

_ROWS_FAULT = (400, 404, 413, 422)
_BUSY = (408, 429, 502, 503, 504)
_CUT = (httpx.ProtocolError, httpx.ReadError, httpx.WriteError)
"""The connection broke while a row was asked: the server restarts, or the row killed it."""
_TRIES = 3  # of a row on which the server itself fails, or that it does not answer in time
_LONGEST_WAIT = 10.0  # seconds between two tries
_WRONG_SERVER = "Is it the right URL and key?"
_PATIENCE = 600.0  # seconds without any answer after which a batch is given up


@asynccontextmanager
async def connect(
    url: str,
    *,
    key: str | None = None,
    concurrency: int = 64,
    timeout: float | None = None,
    uds: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client for the server at `url`, or behind the socket file `uds`; `timeout` in seconds bounds each answer.

    Raises InputError for a bad URL.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InputError("--url is no URL.") from None  # its text quotes the URL
    if parsed.userinfo:
        raise InputError("--url holds a name or password: give the server's key by VLLM_API_KEY.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("--url must begin with http:// or https://.")
    if key:
        warn_of_clear_text(parsed.scheme, parsed.host)
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
        transport=transport or httpx.AsyncHTTPTransport(limits=limits, uds=uds, socket_options=None if uds else alive),
        trust_env=False,  # prompts and keys go to the server, and not by a proxy of the environment
    ) as client:
        yield client


async def served_models(client: httpx.AsyncClient) -> str:
    """The base models of a server, for a journal's `made_by`. Raises BatchStopped where it does not say."""
    try:
        answer = await client.get("/v1/models")
    except httpx.RequestError as exc:
        raise BatchStopped(f"The server does not answer: {type(exc).__name__} {hide(str(exc))}".rstrip()) from exc
    found = (json_object(answer.content) or {}).get("data")
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
    Returns the rows that failed: three times 500 or no answer in time, another status that the row
    alone meets, or a server that is busy for the last rows only; a further run asks them again.
    Raises BatchStopped where nothing was answered for `patience` seconds, where `alive` says no, and
    where it is the wrong server or key.
    """
    left = [row for row in rows if row.custom_id not in journal]
    waiting = iter(left)
    failed: dict[str, dict[str, Any]] = {}
    clock = _Clock(patience)

    def last() -> bool:
        return len(journal) > 0 and taken == len(left)

    taken = 0
    alone = asyncio.Lock()

    async def work() -> None:
        nonlocal taken
        for row in waiting:
            taken += 1
            answer, final = await _ask(client, row, clock, alive, lambda: len(journal) > 0, last, alone)
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
    client: httpx.AsyncClient,
    row: BatchRow,
    clock: _Clock,
    alive: Callable[[], bool],
    proven: Callable[[], bool],
    last: Callable[[], bool],
    alone: asyncio.Lock,
) -> tuple[dict[str, Any], bool]:
    """One row's answer, as a row of the output, and whether it is final.

    `proven`: others were answered before; `last`: and none waits to be asked. A row whose
    connection broke is asked again when the server is there again, `alone` among such rows:
    one that kills it must not be asked for ever, nor take the others with it.
    """
    wait, broken = 0.5, 0
    since: float | None = None
    cut = False
    while True:
        answer, named = None, ""
        try:
            async with alone if cut else contextlib.nullcontext():
                if cut:
                    await _until_there(client, clock, alive, since)
                answer = await client.post(row.url, content=row.content, headers={"Content-Type": "application/json"})
        except httpx.RequestError as exc:
            why = f"The server does not answer: {type(exc).__name__} {hide(str(exc))}".rstrip() + "."
            cut = cut or isinstance(exc, _CUT)
            broken += isinstance(exc, (httpx.ReadTimeout, httpx.DecodingError, *_CUT))
        else:
            status, body = answer.status_code, json_object(answer.content)
            if (answer.is_success and body is not None) or _is_rows_fault(answer):
                return _as_row(row, answer), True
            why = f"The server answered {status}: {_message(answer)}"
            broken += status in (httpx.codes.INTERNAL_SERVER_ERROR, httpx.codes.GATEWAY_TIMEOUT)
            if status not in (*_BUSY, httpx.codes.INTERNAL_SERVER_ERROR):
                if not proven() or status == httpx.codes.UNAUTHORIZED or not answer.is_error:
                    where = answer.headers.get("location")
                    raise BatchStopped(f"{why}{f' (it points to {safe_url(where)})' if where else ''} {_WRONG_SERVER}")
                return _as_row(row, answer), False
            named = answer.headers.get("retry-after", "")
        if not alive():
            raise BatchStopped("The server ended; its log above says why.")
        if broken == _TRIES:
            return (_as_row(row, answer) if answer is not None else _unanswered(row, why)), False
        since = since or time.monotonic()
        if clock.out(since):
            if answer is not None and last():
                return _as_row(row, answer), False
            raise BatchStopped(f"Nothing was answered for {clock.patience:.0f} s. {why}")
        pause = min(float(named) if named.isdecimal() else wait, _LONGEST_WAIT)
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
        wait *= 2


async def _until_there(
    client: httpx.AsyncClient, clock: _Clock, alive: Callable[[], bool], since: float | None
) -> None:
    """Return when the server answers anything. Raises BatchStopped where it ended, or nothing was answered for long."""
    while True:
        try:
            if not (await client.get("/v1/models")).is_server_error:
                return
        except httpx.RequestError:
            pass
        if not alive():
            raise BatchStopped("The server ended; its log above says why.")
        if since is not None and clock.out(since):
            raise BatchStopped(f"Nothing was answered for {clock.patience:.0f} s. The server went away.")
        await asyncio.sleep(min(1.0, _LONGEST_WAIT))


def _is_rows_fault(answer: httpx.Response) -> bool:
    """Whether a refusal is about the row, and not a route that this server does not have."""
    if answer.status_code == httpx.codes.NOT_FOUND and _message(answer) in ("Not Found", ""):
        return False
    return answer.status_code in _ROWS_FAULT and json_object(answer.content) is not None


def _message(answer: httpx.Response) -> str:
    body = json_object(answer.content) or {}
    error = body.get("error", body.get("detail", ""))
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or ""
    return str(error)[:500]


def _unanswered(row: BatchRow, why: str) -> dict[str, Any]:
    error = {"code": "no_answer", "message": why}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": None, "error": error}


def _as_row(row: BatchRow, answer: httpx.Response) -> dict[str, Any]:
    body = json_object(answer.content)
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
