"""Servers that the benchmark starts itself: one with the plugin, one stock vLLM.

Each runs in a process group of its own and is always stopped, after an error and
after Ctrl-C too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.client import ServerClient, ServerError
from benchmarks.machine import gpus

_STOP_SECONDS = 20.0
_TAIL_LINES = 25


@dataclass(frozen=True)
class ServerOptions:
    """How the benchmark's own servers are started."""

    model: str
    server_args: Sequence[str] = ()
    """For both servers, as the user wrote them; later ones override ours."""
    plugin_args: Sequence[str] = ()
    """For the plugin server alone, such as `--be-injection resident-rows`."""
    kv_gib: int = 1
    """KV cache of each server on a CPU, in GiB."""
    start_timeout: float = 600.0
    """Seconds until a server must answer `/health`."""


class Server:
    """A server process: started on entry, its whole process group ended on exit.

    async with Server("stock", command, log=path, env=env, port=port, timeout=600) as server:
        server.url
    """

    def __init__(
        self, name: str, command: Sequence[str], *, log: Path, env: dict[str, str], port: int, timeout: float
    ) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.start_seconds = 0.0
        self.env = env
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._frozen = False

    async def __aenter__(self) -> Server:
        begin = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as sink:
            sink.write(f"$ {shlex.join(self.command)}\n".encode())
            sink.flush()
            # A group of its own: the terminal's Ctrl-C reaches the benchmark alone, which then stops the servers.
            self._process = subprocess.Popen(  # noqa: S603
                self.command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=self.env, start_new_session=True
            )
        try:
            await self._wait_until_healthy(begin)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()

    async def _wait_until_healthy(self, begin: float) -> None:
        assert self._process is not None
        async with ServerClient(self.url) as client:
            while not await client.healthy():
                if (status := self._process.poll()) is not None:
                    raise ServerError(f"The {self.name} server ended with status {status}.\n{self.tail()}")
                if time.monotonic() - begin > self._timeout:
                    raise ServerError(
                        f"The {self.name} server did not answer within {self._timeout:.0f} s "
                        f"(--start-timeout).\n{self.tail()}"
                    )
                await asyncio.sleep(0.5)

    def tail(self) -> str:
        """The last lines of the server's log, with its path."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        except OSError:
            lines = []
        return "\n".join([f"Last lines of {self.log}:", *(f"  {line}" for line in lines)])

    @property
    def pid(self) -> int:
        """Number of the process, and of the group of all processes of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

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


def stock_server(options: ServerOptions, out: Path, max_model_len: int) -> Server:
    """Plain vLLM: the same command with the plugin switched off, none of our flags."""
    return _server("stock", options, out, max_model_len, ["--be-off"])


def plugin_server(
    options: ServerOptions,
    out: Path,
    max_model_len: int,
    *,
    token: tuple[str, Path] | None = None,
    admin_key: str | None = None,
) -> Server:
    """vLLM with the plugin, with a registry of its own; `token` is an id and the file it names."""
    registry = f"sqlite:///{(out / 'registry.db').resolve()}"
    named = ["--be-token", f"{token[0]}={token[1]}"] if token else []
    server = _server("plugin", options, out, max_model_len, ["--be-registry", registry, *named, *options.plugin_args])
    if admin_key:
        server.env["BE_ADMIN_KEY"] = admin_key
    return server


def _server(name: str, options: ServerOptions, out: Path, max_model_len: int, extra: Sequence[str]) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "be_serve.cli.main", "serve", options.model, "--host", "127.0.0.1"]
    # The flag makes `usage` tell how many prompt tokens came from the cache.
    command += ["--port", str(port), "--max-model-len", str(max_model_len), "--enable-prompt-tokens-details"]
    if gpus():
        command += ["--gpu-memory-utilization", "0.42"]  # two servers share the GPU
    else:
        command += ["--enforce-eager", "--dtype", "bfloat16"]
    command += [*options.server_args, *extra]
    env = server_env(options.kv_gib)
    return Server(name, command, log=out / f"{name}.log", env=env, port=port, timeout=options.start_timeout)


def server_env(kv_gib: int) -> dict[str, str]:
    """The caller's environment with the benchmark's defaults; what the caller set wins."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds; stock vLLM closes an idle connection after five, between two of our requests.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    }
    # Settings of ours in the caller's shell must not reach the stock server, nor change the plugin's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BE_") or k == "BE_HOME"}
    return {**defaults, **inherited}


def engine_settings(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that steer vLLM and its threads, without keys."""
    chosen = {k: v for k, v in env.items() if k.startswith(("VLLM_", "OMP_", "CUDA_VISIBLE"))}
    return {k: v for k, v in sorted(chosen.items()) if "KEY" not in k and "TOKEN" not in k}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
