"""Servers that the benchmark starts itself: one with the plugin, one stock vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from be_serve.core.redaction import redact_environment
from be_serve.process import Server, free_port
from benchmarks.common.machine import gpus


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
    return Server(name, command, log=out / f"{name}.log", env=env, at=port, timeout=options.start_timeout)


def run_alone(servers: Mapping[Any, Server], name: object) -> None:
    """Let one of our servers run while the others rest.

    They are frozen first, so that no server begins beside a worker that still spins.
    """
    for other, server in servers.items():
        if other != name:
            server.freeze()
    if name in servers:
        servers[name].thaw()


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
    """The variables of an environment that steer vLLM and its threads, without secrets."""
    chosen = {k: v for k, v in env.items() if k.startswith(("VLLM_", "OMP_", "ONEDNN_", "CUDA_VISIBLE"))}
    return redact_environment(dict(sorted(chosen.items())))
