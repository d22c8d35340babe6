"""Start real servers for tests, and stop them whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ADMIN_KEY = "test-admin-key"
MODEL = "builtin:smollm2-135m-instruct"
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM's processes poll for a second after each request: a thread a core leaves none for them,
    # and OpenMP's barriers then wait for the scheduler (measured on 2 cores: 8 times slower).
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) - 1)),
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
COMMON_FLAGS = [
    "--enforce-eager",
    "--max-model-len=4096",
    # Small, so that prompts of a test's size are prefilled in several steps.
    "--max-num-batched-tokens=512",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
]


class Server:
    """One server process group, its log in a file.

    with Server(command, log, env) as server:
        httpx.get(server.url + "/health")
    """

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._command = [*command, f"--port={self.port}", "--host=127.0.0.1"]
        self._env = {**os.environ, **CPU_ENV, **(env or {})}

    def __enter__(self) -> Server:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, stdout=out, stderr=out, env=self._env, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def kill(self) -> None:
        """SIGKILL the whole process group."""
        self._signal(signal.SIGKILL)
        self.process.wait(20)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _wait(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"The server ended with {self.process.returncode}:\n{self.tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"The server did not come up in {seconds} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of the log, for a failure's message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def be_serve(*arguments: str) -> list[str]:
    """The `be-serve serve` command for the default model."""
    return be_serve_model(MODEL, *COMMON_FLAGS, *arguments)


def be_serve_model(model: str, *arguments: str) -> list[str]:
    """The `be-serve serve` command for any model."""
    return [str(Path(sys.executable).with_name("be-serve")), "serve", model, *arguments]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
