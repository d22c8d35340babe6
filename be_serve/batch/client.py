"""Sends each row to a server, and retries while the server is busy or away."""

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
from be_serve.core.addresses import checked_key, warn_of_clear_text
from be_serve.core.errors import BatchStopped, InputError
from be_serve.core.redaction import hide, safe_url

_ROW_ERRORS = (400, 404, 413, 422)
_BUSY = (408, 429, 502, 503, 504)
_CONNECTION_LOST = (httpx.ProtocolError, httpx.ReadError, httpx.WriteError)
"""The connection broke during a request: the server restarts, or this row made it crash."""
_TRIES = 3  # for a row that gets a server error, a broken connection or no answer in time
_LONGEST_WAIT = 10.0  # seconds between two tries
_WRONG_SERVER = "Check the URL and the key."
_PATIENCE = 600.0  # seconds without an answer to any row after which the batch stops


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
    """An HTTP client for the server at `url`, or at the socket file `uds`.

    `timeout` is the limit in seconds for each answer. Raises InputError for a wrong URL or key.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        # Without the cause, whose text quotes the URL.
        raise InputError("--url is no URL. Use http://HOST:PORT.") from None
    if parsed.userinfo:
        raise InputError("--url contains a user or password. Remove it, and set the server's key as VLLM_API_KEY.")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError("--url must begin with http:// or https://.")
    if key:
        warn_of_clear_text(parsed.scheme, parsed.host)
    headers = {}
    if key and (key := checked_key(key, "VLLM_API_KEY")):
        headers["Authorization"] = f"Bearer {key}"
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    # If the server's machine loses power, no packet tells us. Without keep-alive a worker would wait for ever.
    keepalive = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    async with httpx.AsyncClient(
        base_url=str(parsed).rstrip("/").removesuffix("/v1"),
        headers=headers,
        timeout=httpx.Timeout(timeout, connect=10.0),
        transport=transport
        or httpx.AsyncHTTPTransport(limits=limits, uds=uds, socket_options=None if uds else keepalive),
        trust_env=False,  # prompts and keys must not pass a proxy of the environment
    ) as client:
        yield client


async def served_models(client: httpx.AsyncClient) -> str:
    """The names of a server's base models, for a journal's `made_by`. Raises BatchStopped if it does not answer."""
    try:
        answer = await client.get("/v1/models")
    except httpx.RequestError as exc:
        raise BatchStopped(f"The server does not answer: {type(exc).__name__} {hide(str(exc))}".rstrip()) from exc
    data = (json_object(answer.content) or {}).get("data")
    if not answer.is_success or not isinstance(data, list):
        raise BatchStopped(f"GET /v1/models answered {answer.status_code}: {_message(answer)} {_WRONG_SERVER}")
    models = [model for model in data if isinstance(model, dict) and not model.get("parent")]
    return ", ".join(sorted(f"{model.get('id')} ({model.get('root')})" for model in models))


@dataclass
class _LastAnswer:
    """The time of the last answer to any row."""

    patience: float
    at: float = field(default_factory=time.monotonic)

    def update(self) -> None:
        self.at = time.monotonic()

    def is_too_old(self, since: float) -> bool:
        """Whether no row was answered for `patience` seconds, counted from `since` at the earliest."""
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
    """Send every row that the journal does not hold, `concurrency` rows at a time. Returns the rows that failed.

    Retries while the server is busy or away, as long as any row is answered within `patience` seconds. A row
    fails after three times 500, a broken connection or no answer in time, after an unexpected status, or if the
    server stays busy for the last rows only. The next run sends failed rows again.
    Raises BatchStopped if no row was answered for `patience` seconds, if `alive` returns False, or if it is the
    wrong server or key.
    """
    left = [row for row in rows if row.custom_id not in journal]
    waiting = iter(left)
    failed: dict[str, dict[str, Any]] = {}
    last_answer = _LastAnswer(patience)

    def no_more_rows() -> bool:
        return len(journal) > 0 and taken == len(left)

    taken = 0
    one_at_a_time = asyncio.Lock()

    async def work() -> None:
        nonlocal taken
        for row in waiting:
            taken += 1
            answer, final = await _send(
                client, row, last_answer, alive, lambda: len(journal) > 0, no_more_rows, one_at_a_time
            )
            if final:
                journal.add(answer)
                last_answer.update()
            else:
                failed[row.custom_id] = answer
            done()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    except BatchStopped as exc:
        kept = f"{len(journal)} answers are kept in {journal.path}" if len(journal) else "There were no answers yet"
        raise BatchStopped(f"{exc} {kept}. Run the same command without --fresh to continue.") from exc
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return failed


async def _send(
    client: httpx.AsyncClient,
    row: BatchRow,
    last_answer: _LastAnswer,
    alive: Callable[[], bool],
    proven: Callable[[], bool],
    no_more_rows: Callable[[], bool],
    one_at_a_time: asyncio.Lock,
) -> tuple[dict[str, Any], bool]:
    """One row's answer, as a row of the output, and whether the answer is final.

    `proven`: this server has answered other rows. `no_more_rows`: it has, and every other row was sent. A row
    that lost its connection is sent again when the server is back. Such rows are sent `one_at_a_time` and only
    `_TRIES` times: one of them may make the server crash, and other rows must not lose their tries by that.
    """
    wait, failures = 0.5, 0
    since: float | None = None
    lost = False
    while True:
        answer, retry_after = None, ""
        try:
            async with one_at_a_time if lost else contextlib.nullcontext():
                if lost:
                    await _wait_for_server(client, last_answer, alive, since)
                answer = await client.post(row.url, content=row.content, headers={"Content-Type": "application/json"})
        except httpx.RequestError as exc:
            why = f"The server does not answer: {type(exc).__name__} {hide(str(exc))}".rstrip() + "."
            lost = lost or isinstance(exc, _CONNECTION_LOST)
            failures += isinstance(exc, (httpx.ReadTimeout, httpx.DecodingError, *_CONNECTION_LOST))
        else:
            status, body = answer.status_code, json_object(answer.content)
            if (answer.is_success and body is not None) or _is_row_error(answer):
                return _as_row(row, answer), True
            why = f"The server answered {status}: {_message(answer)}"
            failures += status in (httpx.codes.INTERNAL_SERVER_ERROR, httpx.codes.GATEWAY_TIMEOUT)
            if status not in (*_BUSY, httpx.codes.INTERNAL_SERVER_ERROR):
                if not proven() or status == httpx.codes.UNAUTHORIZED or not answer.is_error:
                    target = answer.headers.get("location")
                    raise BatchStopped(
                        f"{why}{f' (it points to {safe_url(target)})' if target else ''} {_WRONG_SERVER}"
                    )
                return _as_row(row, answer), False
            retry_after = answer.headers.get("retry-after", "")
        if not alive():
            raise BatchStopped("The server ended; its log above says why.")
        if failures == _TRIES:
            return (_as_row(row, answer) if answer is not None else _unanswered(row, why)), False
        since = since or time.monotonic()
        if last_answer.is_too_old(since):
            if answer is not None and no_more_rows():
                return _as_row(row, answer), False
            raise BatchStopped(f"No row was answered for {last_answer.patience:.0f} s. {why}")
        pause = min(float(retry_after) if retry_after.isdecimal() else wait, _LONGEST_WAIT)
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311
        wait *= 2


async def _wait_for_server(
    client: httpx.AsyncClient, last_answer: _LastAnswer, alive: Callable[[], bool], since: float | None
) -> None:
    """Return when the server answers /v1/models. Raises BatchStopped if it ended, or after `patience` seconds."""
    while True:
        try:
            if not (await client.get("/v1/models")).is_server_error:
                return
        except httpx.RequestError:
            pass
        if not alive():
            raise BatchStopped("The server ended; its log above says why.")
        if since is not None and last_answer.is_too_old(since):
            raise BatchStopped(f"No row was answered for {last_answer.patience:.0f} s. The server is away.")
        await asyncio.sleep(min(1.0, _LONGEST_WAIT))


def _is_row_error(answer: httpx.Response) -> bool:
    """Whether a refusal is about the row. A 404 for a missing route is not."""
    if answer.status_code == httpx.codes.NOT_FOUND and _message(answer) in ("Not Found", ""):
        return False
    return answer.status_code in _ROW_ERRORS and json_object(answer.content) is not None


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
    if be_headers := {name: value for name, value in answer.headers.items() if name.startswith("x-be-")}:
        response["headers"] = be_headers  # such as x-be-fallback
    error = body.get("error", body) if answer.is_error else None
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": row.custom_id, "response": response, "error": error}
