"""The command class of `serve` and `run-batch`: it passes unknown options to vLLM."""

from __future__ import annotations

import re
from typing import Any

import click

_HIDING_PREFIX = "--be-aside"
_SINGLE_DASH_WORD = re.compile(r"-[A-Za-z][^-]")


class PassOnCommand(click.Command):
    """A command that collects the options it does not know in `ctx.args`, for vLLM."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}
        super().__init__(name, **{"context_settings": settings, **kwargs})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line without splitting vLLM's single-dash options.

        click reads `-tp` as `-t -p` and `-dph` as a request for help. A prefix hides these words from click.
        """
        own = {name for p in self.get_params(ctx) if p.param_type_name == "option" for name in p.opts if name != "-h"}
        hidden = [f"{_HIDING_PREFIX}{a}" if _SINGLE_DASH_WORD.match(a) and a[:2] not in own else a for a in args]
        rest = super().parse_args(ctx, hidden)
        ctx.args = [_unhide(a) for a in ctx.args]
        ctx.params = {name: _unhide(value) for name, value in ctx.params.items()}
        return rest


def _unhide(value: Any) -> Any:
    """Return a word or an option's value(s) without the hiding prefix."""
    if isinstance(value, tuple):
        return tuple(_unhide(one) for one in value)
    return value.removeprefix(_HIDING_PREFIX) if isinstance(value, str) else value
