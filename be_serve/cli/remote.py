"""Options that the verbs talking to a server share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def server_options(function: F) -> F:
    """`--url`, `--api-key` and `--vllm-api-key`."""
    for option in (
        click.option("--vllm-api-key", envvar="VLLM_API_KEY", help="The server's --api-key, where it has one."),
        click.option(
            "--api-key", envvar="BE_ADMIN_KEY", required=True, help="The server's admin key.  [env: BE_ADMIN_KEY]"
        ),
        click.option("--url", envvar="BE_URL", default="http://127.0.0.1:8000", show_default=True),
    ):
        function = option(function)
    return function
