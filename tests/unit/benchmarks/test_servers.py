"""Servers that the benchmark starts: waited for, logged, frozen, always stopped."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from be_serve.batch import connect
from be_serve.core.errors import ServerError
from be_serve.process import Server, free_port
from benchmarks.common.client import ServerClient
from benchmarks.common.servers import (
    ServerOptions,
    engine_settings,
    plugin_server,
    server_env,
    start_all,
    stock_server,
)

# Answers /health, after a while; leaves a child of its own that ignores SIGTERM, as an engine may.
_SCRIPT = """
import http.server, signal, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
print("child", subprocess.Popen([sys.executable, "-c", child]).pid, flush=True)
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def make_server(tmp_path: Path, script: str = _SCRIPT, timeout: float = 30.0) -> Server:
    port = free_port()
    command = [sys.executable, "-c", script, str(port)]
    return Server("test", command, log=tmp_path / "test.log", env=dict(os.environ), at=port, timeout=timeout)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def child_of(log: Path) -> int:
    return next(
        int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child ") and "=" not in line
    )


async def test_started_frozen_thawed_and_stopped_with_its_children(tmp_path):
    async with make_server(tmp_path) as server:
        assert server.alive
        assert server.start_seconds > 0.4
        child = child_of(server.log)
        async with ServerClient(server.url) as client:
            assert await client.healthy()
            server.freeze()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.healthy(), 0.5)
        server.thaw()
        async with ServerClient(server.url) as client:
            assert await client.healthy()
        server.freeze()  # and must still be stoppable
        assert running(child)
    assert not server.alive
    for _ in range(50):
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


async def test_a_server_behind_a_socket_file_is_waited_for_and_found_there(tmp_path):
    socket = tmp_path / "server"
    app = "from starlette.applications import Starlette; from starlette.routing import Route; "
    app += "from starlette.responses import PlainTextResponse as P; import uvicorn; "
    app += "app = Starlette(routes=[Route('/health', lambda r: P(''))]); uvicorn.run(app, uds='{}')"
    command = [sys.executable, "-c", app.format(socket)]
    server = Server("test", command, log=tmp_path / "log", env=dict(os.environ), at=socket, timeout=30)
    async with server, connect(server.url, uds=server.socket) as client:
        assert (await client.get("/health")).is_success


async def test_a_server_that_ends_shows_its_log(tmp_path):
    script = "import sys; print('not enough memory for the cache'); sys.exit(3)"
    with pytest.raises(ServerError, match=r"(?s)ended with status 3.*not enough memory"):
        async with make_server(tmp_path, script):
            pass


async def test_neither_log_nor_error_shows_what_the_server_was_given_as_a_secret(tmp_path):
    """It may print its command and its environment itself."""
    script = "import os, sys; print(sys.argv[1:], os.environ['HF_TOKEN']); sys.exit(3)"
    given = ["--api-key", "first-key", "second-key", "--x", "http://me:fourth-key@host/", "--hf-token=third-key"]
    env = {**os.environ, "HF_TOKEN": "fifth-key"}
    command = [sys.executable, "-c", script, *given]
    server = Server("test", command, log=tmp_path / "log", env=env, at=free_port(), timeout=30)
    with pytest.raises(ServerError) as caught:
        await server.__aenter__()
    assert "Last lines of" in str(caught.value)
    header = (tmp_path / "log").read_text().splitlines()[0]
    assert header.startswith("$ ")
    for shown in (str(caught.value), header):
        assert "-key'" not in shown.replace("--api-key'", "")
        for key in ("first-key", "second-key", "third-key", "fourth-key", "fifth-key"):
            assert key not in shown


async def test_a_server_that_never_answers_is_stopped(tmp_path):
    server = make_server(tmp_path, "import time; print('loading', flush=True); time.sleep(600)", timeout=1.5)
    with pytest.raises(ServerError, match=r"(?s)did not answer within 2 s.*loading"):
        async with server:
            pass
    assert not server.alive


async def test_cancelling_the_start_stops_it(tmp_path):
    server = make_server(tmp_path, "import time; time.sleep(600)")
    task = asyncio.create_task(server.__aenter__())
    await asyncio.sleep(0.3)
    assert server.alive
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not server.alive


def test_commands(tmp_path):
    options = ServerOptions("m", server_args=("--dtype", "float32"), plugin_args=("--be-injection", "x"))
    stock = stock_server(options, tmp_path, 2048).command
    plugin = plugin_server(options, tmp_path, 2048, token=("bench", tmp_path / "t.safetensors")).command
    assert "--be-off" in stock
    assert not {"--be-token", "--be-injection", "--enable-prompt-embeds"} & set(stock)
    assert plugin[plugin.index("--be-token") + 1] == f"bench={tmp_path / 't.safetensors'}"
    assert plugin[plugin.index("--be-registry") + 1] == f"sqlite:///{tmp_path.resolve()}/registry.db"
    for command in (stock, plugin):
        assert command[command.index("serve") + 1] == "m"
        assert command[-1 - command[::-1].index("--dtype") + 1] == "float32"  # the user's comes last and wins


def test_environment(monkeypatch):
    monkeypatch.setenv("BE_TOKEN", "a=b")
    monkeypatch.setenv("BE_HOME", "/models")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("VLLM_API_KEY", "hidden")
    monkeypatch.setenv("VLLM_USAGE_STATS_SERVER", "https://me:hidden@host/x")
    monkeypatch.setenv("VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "4")
    env = server_env(2)
    shown = engine_settings(env)
    assert shown["OMP_NUM_THREADS"] == "2"
    assert "hidden" not in str(shown)
    assert shown["VLLM_USAGE_STATS_SERVER"] == "https://***@host/x"
    assert shown["VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE"] == "4"
    assert "BE_TOKEN" not in env
    assert env["BE_HOME"] == "/models"
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "2"


async def test_without_a_gpu_servers_start_at_the_same_time_and_stop_together(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.servers.gpus", list)
    servers = [make_server(tmp_path / name) for name in "ab"]
    begin = time.monotonic()
    async with AsyncExitStack() as stack:
        await start_all(stack, servers)
        assert all(server.alive for server in servers)
        assert time.monotonic() - begin < sum(server.start_seconds for server in servers)
    assert not any(server.alive for server in servers)


async def test_one_that_does_not_start_is_told_and_no_other_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.servers.gpus", list)
    servers = [make_server(tmp_path / "good"), make_server(tmp_path / "bad", "raise SystemExit(3)")]
    with pytest.raises(ServerError, match="ended with status 3"):
        async with AsyncExitStack() as stack:
            await start_all(stack, servers)
    assert not any(server.alive for server in servers)


async def test_on_a_gpu_servers_start_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.servers.gpus", lambda: ["NVIDIA H100"])
    servers = [make_server(tmp_path / name) for name in "ab"]
    begin = time.monotonic()
    async with AsyncExitStack() as stack:
        await start_all(stack, servers)
        assert time.monotonic() - begin >= sum(server.start_seconds for server in servers)
