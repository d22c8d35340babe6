"""Options that the verbs talking to a server share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _required(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if not value:
        raise click.UsageError("Set BE_ADMIN_KEY (or give --admin-key): the key that the server was started with.")
    return value


def server_options(function: F) -> F:
    """`--url`, `--admin-key` (also `--api-key`) and `--vllm-api-key`."""
    for option in (
        click.option("--vllm-api-key", envvar="VLLM_API_KEY", help="The server's --api-key, where it has one."),
        click.option(
            "--admin-key",
            "--api-key",
            "api_key",
            envvar="BE_ADMIN_KEY",
            callback=_required,
            help="The server's admin key; BE_ADMIN_KEY keeps it out of the process list.",
        ),
        click.option("--url", envvar="BE_URL", default="http://127.0.0.1:8000", show_default=True, show_envvar=True),
    ):
        function = option(function)
    return function
