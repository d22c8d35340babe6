"""Start the benchmark's own servers: one with the plugin, one stock vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from be_serve.core.redaction import redact_environment
from be_serve.process import Server, free_port
from benchmarks.common.machine import gpus


@dataclass(frozen=True)
class ServerOptions:
    """Settings of the servers that the benchmark starts."""

    model: str
    server_args: Sequence[str] = ()
    """User's vLLM flags for both servers. They override the benchmark's flags."""
    plugin_args: Sequence[str] = ()
    """Flags for the plugin server only, for example `--be-injection resident-rows`."""
    kv_gib: int = 1
    """KV cache of each server on a CPU, in GiB."""
    start_timeout: float = 600.0
    """Maximum seconds until a server answers `/health`."""


def stock_server(options: ServerOptions, out: Path, max_model_len: int) -> Server:
    """Return a server of stock vLLM: the same command with `--be-off`, without the plugin's flags."""
    return _server("stock", options, out, max_model_len, ["--be-off"])


def plugin_server(
    options: ServerOptions,
    out: Path,
    max_model_len: int,
    *,
    token: tuple[str, Path] | None = None,
    admin_key: str | None = None,
) -> Server:
    """Return a server with the plugin and a new registry in `out`. `token` is an id and a token file to load."""
    registry = f"sqlite:///{(out / 'registry.db').resolve()}"
    named = ["--be-token", f"{token[0]}={token[1]}"] if token else []
    server = _server("plugin", options, out, max_model_len, ["--be-registry", registry, *named, *options.plugin_args])
    if admin_key:
        server.env["BE_ADMIN_KEY"] = admin_key
    return server


def _server(name: str, options: ServerOptions, out: Path, max_model_len: int, extra: Sequence[str]) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "be_serve.cli.main", "serve", options.model, "--host", "127.0.0.1"]
    # The last flag adds the number of cached prompt tokens to `usage`.
    command += ["--port", str(port), "--max-model-len", str(max_model_len), "--enable-prompt-tokens-details"]
    if gpus():
        command += ["--gpu-memory-utilization", "0.42"]  # two servers share the GPU's memory
    else:
        command += ["--enforce-eager", "--dtype", "bfloat16"]
    command += [*options.server_args, *extra]
    env = server_env(options.kv_gib)
    return Server(name, command, log=out / f"{name}.log", env=env, at=port, timeout=options.start_timeout)


async def start_all(stack: AsyncExitStack, servers: Iterable[Server]) -> None:
    """Start servers; `stack` stops them. Raises the ServerError of the first one that does not start.

    Without a GPU they start at the same time, because a start keeps one core busy; `start_seconds` then includes the
    others' work. On a GPU they start one after another: vLLM measures the free memory while it starts.
    """
    if gpus():
        for server in servers:
            await stack.enter_async_context(server)
        return
    starting = list(servers)
    for server in starting:
        stack.push_async_exit(server)
    ended = await asyncio.gather(*(server.start() for server in starting), return_exceptions=True)
    for fault in ended:
        if isinstance(fault, BaseException):
            raise fault


def run_alone(servers: Mapping[Any, Server], name: object) -> None:
    """Suspend all own servers except `name`, then resume `name`.

    The others stop first, so that no spinning worker of theirs runs at the same time.
    """
    for other, server in servers.items():
        if other != name:
            server.freeze()
    if name in servers:
        servers[name].thaw()


def server_env(kv_gib: int) -> dict[str, str]:
    """Return the caller's environment plus the benchmark's defaults. The caller's values override the defaults."""
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        # Seconds. Stock vLLM closes a connection after 5 idle seconds, which can be between two requests.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    }
    # BE_ variables of the caller's shell must not change the stock server or the plugin server.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("BE_") or k == "BE_HOME"}
    return {**defaults, **inherited}


def engine_settings(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that configure vLLM and its threads, with secrets redacted."""
    chosen = {k: v for k, v in env.items() if k.startswith(("VLLM_", "OMP_", "ONEDNN_", "CUDA_VISIBLE"))}
    return redact_environment(dict(sorted(chosen.items())))
