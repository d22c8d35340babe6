"""A server in a process group of its own: started, waited for, and always stopped.

After an error and after Ctrl-C too; where this process is killed, the kernel tells the server.
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
    """A server process: started on entry, its whole process group ended on exit.

    async with Server("stock", command, log=path, env=env, at=port, timeout=600) as server:
        server.url

    It answers at a TCP port, or at a socket file, which only those reach who may enter its
    folder: a port that was free may be another's by the time the server takes it. Without
    `log` its words go to standard error. Raises ServerError where it does not come up.
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
            # A group of its own: the terminal's Ctrl-C reaches this process alone, which then stops the server.
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
        way = httpx.AsyncHTTPTransport(uds=self.socket)
        async with httpx.AsyncClient(base_url=self.url, timeout=10.0, transport=way, trust_env=False) as http:
            while not await _healthy(http):
                if (status := self._process.poll()) is not None:
                    ended = ServerError(f"The {self.name} server ended with status {status}.{self.tail()}")
                    ended.exit_status = status
                    raise ended
                if time.monotonic() - begin > self._timeout:
                    raise ServerError(
                        f"The {self.name} server did not answer within {self._timeout:.0f} s "
                        f"(--start-timeout).{self.tail()}"
                    )
                await asyncio.sleep(0.5)

    def tail(self) -> str:
        """The last lines of the server's log on lines of their own, with its path; empty without a log.

        What the server was given as a secret is hidden: it may have printed its command or settings.
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
        """Number of the process, and of the group of all processes of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def cpu_seconds(self) -> float | None:
        """Processor time that the process started here has used, without its children's; None but on Linux."""
        # The clock of a process by its number, as clock_getcpuclockid(3) makes it.
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED) if sys.platform == "linux" else None

    def freeze(self) -> None:
        """Stop the group's clock (SIGSTOP) while another server is being timed.

        A vLLM worker spins for one second after its last step before it goes idle.
        On two cores that was seen to turn 145 ms of the other server into 1,049 ms.
        """
        if not self._frozen and self._signal(signal.SIGSTOP):
            self._frozen = True

    def thaw(self) -> None:
        """Let a frozen server run on."""
        if self._frozen and self._signal(signal.SIGCONT):
            self._frozen = False

    def stop(self) -> None:
        """End the group: SIGTERM, and SIGKILL for whatever is left of it."""
        if self._process is None:
            return
        self.thaw()
        self._signal(signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_STOP_SECONDS)
        finally:  # also after a second Ctrl-C
            self._signal(signal.SIGKILL)  # engine processes that outlived the API server, too
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
    """What the new process calls first on Linux: SIGTERM, once its parent is gone however it went."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
