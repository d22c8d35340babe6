"""Starts a server in its own process group, waits until it answers, and always stops it.

It also stops the server after an error and after Ctrl-C. If this process is killed, the Linux kernel
sends SIGTERM to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from be_serve.core.errors import ServerError
from be_serve.core.redaction import hide, redact, secrets_of

_STOP_SECONDS = 20.0
_TAIL_LINES = 25
_PR_SET_PDEATHSIG = 1
_CPUCLOCK_SCHED = 2
_STDERR = 2


class Server:
    """A server process, started on entry. On exit its whole process group is ended.

    async with Server("stock", command, log=path, env=env, at=port, timeout=600) as server:
        server.url

    `at` is a TCP port or the path of a socket file. A free port may be taken by another process before the
    server opens it; a socket file in a private folder cannot. Without `log` the server's output goes to
    standard error. Raises ServerError if the server does not answer within `timeout` seconds, or ends.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path | None,
        env: dict[str, str],
        at: int | Path,
        timeout: float,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.socket = str(at) if isinstance(at, Path) else None
        self.url = "http://localhost" if self.socket else f"http://127.0.0.1:{at}"
        self.start_seconds = 0.0
        self.env = env
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    async def start(self) -> None:
        """Start the server and wait until it answers. Raises ServerError; what was started is then stopped."""
        begin = time.monotonic()
        with contextlib.ExitStack() as files:
            sink = _STDERR
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(self.log.open("wb"))
                file.write(f"$ {shlex.join(redact(self.command))}\n".encode())
                file.flush()
                sink = file.fileno()
            # In its own group, so that the terminal's Ctrl-C reaches only this process, which then stops the server.
            self._process = subprocess.Popen(  # noqa: S603
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                env=self.env,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        try:
            await self._wait_until_healthy(begin)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin

    async def _wait_until_healthy(self, begin: float) -> None:
        assert self._process is not None
        transport = httpx.AsyncHTTPTransport(uds=self.socket)
        async with httpx.AsyncClient(base_url=self.url, timeout=10.0, transport=transport, trust_env=False) as http:
            while not await _healthy(http):
                if (status := self._process.poll()) is not None:
                    ended = ServerError(f"The {self.name} server ended with status {status}.{self.tail()}")
                    ended.exit_status = status
                    raise ended
                if time.monotonic() - begin > self._timeout:
                    raise ServerError(
                        f"The {self.name} server did not answer within {self._timeout:.0f} s; "
                        f"raise --start-timeout.{self.tail()}"
                    )
                await asyncio.sleep(0.5)

    def tail(self) -> str:
        """The path and the last lines of the server's log, each on its own line; empty without a log.

        The secrets of the server's command and environment are hidden, because the server may have printed them.
        """
        if self.log is None:
            return ""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        secrets = secrets_of(self.command, self.env)
        return "\n".join([f"\nLast lines of {self.log}:", *(f"  {hide(line, secrets)}" for line in lines)])

    @property
    def pid(self) -> int:
        """The id of the server's process, which is also the id of its process group."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def cpu_seconds(self) -> float | None:
        """Processor seconds of the server's first process, without its children. None if not on Linux."""
        # The clock id of a process, computed as in clock_getcpuclockid(3).
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED) if sys.platform == "linux" else None

    def freeze(self) -> None:
        """Pause the process group (SIGSTOP) while another server is timed.

        A vLLM worker polls for one second after its last step before it sleeps.
        On two cores this raised a time of the other server from 145 ms to 1,049 ms.
        """
        if not self._frozen and self._signal(signal.SIGSTOP):
            self._frozen = True

    def thaw(self) -> None:
        """Continue a paused server (SIGCONT)."""
        if self._frozen and self._signal(signal.SIGCONT):
            self._frozen = False

    def stop(self) -> None:
        """End the process group: SIGTERM first, then SIGKILL for all processes that are left."""
        if self._process is None:
            return
        self.thaw()
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_STOP_SECONDS)
        finally:  # also after a second Ctrl-C
            self._signal(signal.SIGKILL)  # also ends engine processes that outlived the API server
            self._process.wait()

    def _signal(self, number: signal.Signals) -> bool:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


async def _healthy(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health")).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _end_with_parent() -> Callable[[], object] | None:
    """A function for the new process to call first: on Linux it asks for SIGTERM when the parent ends. Else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now. Another process may take it later."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
