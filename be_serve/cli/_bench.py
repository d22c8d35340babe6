"""Options of the benchmarks that start servers of their own."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def split_flags(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """`--FLAG VALUE` in one argument, or several, as words."""
    return tuple(word for value in values for word in shlex.split(value))


def server_flags(function: F) -> F:
    """`--server-arg` for both servers, `--plugin-arg` for the one with the plugin."""
    for option in (
        click.option(
            "--plugin-arg",
            "plugin_args",
            multiple=True,
            callback=split_flags,
            metavar="'--FLAG VALUE'",
            help="Flag for the plugin server alone, such as --be-injection; repeatable.",
        ),
        click.option(
            "--server-arg",
            "server_args",
            multiple=True,
            callback=split_flags,
            metavar="'--FLAG VALUE'",
            help="vLLM flag for both servers started here; repeatable, overrides ours.",
        ),
    ):
        function = option(function)
    return function
