"""`vllm serve` in this process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from be_serve.core.errors import IncompatibleVLLM


def run_server(arguments: Sequence[str]) -> None:
    """`vllm serve` with these arguments, in this process.

    vLLM's own command cannot be used: it looks itself up under the distribution
    name `vllm`, which the CPU build does not have.
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
        raise IncompatibleVLLM("--grpc and the Rust front end run no Python plugins; tokens need the HTTP server.")
    command.validate(args)
    ServeSubcommand.cmd(args)
