"""vLLM's server in this process: behind a port, or as an app that is called without one."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from be_serve.serving.vllm_compat import IncompatibleVLLM, api_keys


@dataclass(frozen=True)
class App:
    """A running server without a port."""

    asgi: Any
    """The ASGI application with all routes, the plugin's among them."""
    key: str | None
    """A key that its `/v1` routes ask for, where it was given one."""
    alive: Callable[[], bool]
    """Whether the engine still works."""


def run_server(arguments: Sequence[str]) -> None:
    """`vllm serve` with these arguments, until it is stopped.

    vLLM's own command cannot be used: it looks itself up under the distribution
    name `vllm`, which the CPU build does not have.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    ServeSubcommand.cmd(_parse(arguments))


@asynccontextmanager
async def open_app(arguments: Sequence[str]) -> AsyncIterator[App]:
    """The same server as `run_server` makes, but nothing listens. Ends the engine on exit.

    vLLM's `run-batch` builds its handlers without an app, so that no endpoint plugin and no
    middleware is ever loaded; here requests take the way of the server's own.
    Raises IncompatibleVLLM for options that need more than one API process.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app

    args = _parse(arguments)
    if (args.api_server_count or 1) != 1 or args.headless:
        raise IncompatibleVLLM("A batch runs in one API process: leave out --api-server-count and --headless.")
    args.model = args.model_tag
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        keys = api_keys(args)
        yield App(app, keys[0] if keys else None, lambda: not engine.errored)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        from vllm.entrypoints.common.startup import cli_env_setup  # 0.33
    except ImportError:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup  # 0.32
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="be-serve", description="vLLM's server with the be_id plugin.")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args: argparse.Namespace = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(args)
    if getattr(args, "grpc", False) or os.environ.get("VLLM_USE_RUST_FRONTEND") == "1":
        raise IncompatibleVLLM("--grpc and the Rust front end run no Python plugins; tokens need the HTTP server.")
    command.validate(args)
    return args
