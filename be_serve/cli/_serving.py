"""What `serve` and `run-batch` share: the plugin's options, beside those that are handed on to vLLM."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_ASIDE = "--be-aside"
_SINGLE_DASH_WORD = re.compile(r"-[A-Za-z][^-]")


class PassOnCommand(click.Command):
    """A verb that hands the options it does not know to vLLM, as `ctx.args`."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]}
        super().__init__(name, **{"context_settings": settings, **kwargs})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep vLLM's words behind a single dash whole: click would read `-tp` as `-t -p`, and `-dph` as help."""
        own = {name for p in self.get_params(ctx) if p.param_type_name == "option" for name in p.opts if name != "-h"}
        aside = [f"{_ASIDE}{a}" if _SINGLE_DASH_WORD.match(a) and a[:2] not in own else a for a in args]
        rest = super().parse_args(ctx, aside)
        ctx.args = [_whole(a) for a in ctx.args]
        ctx.params = {name: _whole(value) for name, value in ctx.params.items()}
        return rest


def _whole(value: Any) -> Any:
    """A value of an option may have looked like such a word, too."""
    if isinstance(value, tuple):
        return tuple(_whole(one) for one in value)
    return value.removeprefix(_ASIDE) if isinstance(value, str) else value


def takes_plugin_options(function: F) -> F:
    """The plugin's options; the command gets them as `plugin`, settings by the variable that carries them."""
    options = (
        click.option(
            "--be-registry",
            metavar="URL",
            envvar="BE_REGISTRY",
            help="Database URL of the registry. [sqlite in the cache folder]",
        ),
        click.option(
            "--be-token", multiple=True, metavar="ID=FILE", help="A token held in memory. Repeatable. [BE_TOKEN]"
        ),
        click.option(
            "--be-admin-key", metavar="KEY", envvar="BE_ADMIN_KEY", help="Key of the /v1/be routes; none: closed."
        ),
        click.option(
            "--be-admin-key-file",
            metavar="FILE",
            envvar="BE_ADMIN_KEY_FILE",
            help="The same from a file; command lines are seen by others.",
        ),
        click.option(
            "--be-injection",
            envvar="BE_INJECTION",
            help="How vectors reach the engine: resident-rows, prompt-embeds, or auto: rows where they are proven. "
            "[auto]",
        ),
        click.option("--be-rows", type=int, envvar="BE_ROWS", help="Rows for vectors on the workers. [1024]"),
        click.option(
            "--be-max-upload", type=int, envvar="BE_MAX_UPLOAD", help="Largest token file in bytes. [67108864]"
        ),
        click.option(
            "--be-cache-bytes",
            type=int,
            envvar="BE_CACHE_BYTES",
            help="Memory for vectors per API process. [268435456]",
        ),
        click.option(
            "--be-match/--no-be-match", default=None, help="Serve tokens for their prompt's own text. [BE_MATCH]"
        ),
        click.option(
            "--be-require/--no-be-require",
            default=None,
            help="Refuse (403) a chat that names no token, and endpoints that take none. [BE_REQUIRE]",
        ),
        click.option(
            "--be-inflight-bytes",
            type=int,
            envvar="BE_INFLIGHT_BYTES",
            help="Memory for running requests with tokens per API process. [1073741824]",
        ),
        click.option(
            "--be-list-aliases/--no-be-list-aliases", default=None, help="Name tokens in /v1/models. [BE_LIST_ALIASES]"
        ),
    )

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        given = {name.upper(): kwargs.pop(name) for name in list(kwargs) if name.startswith("be_") and name != "be_off"}
        return function(*args, plugin=given, **kwargs)

    command: Any = gather
    for option in reversed(options):
        command = option(command)
    return command  # type: ignore[no-any-return]


def variables(plugin: dict[str, Any]) -> dict[str, str]:
    """The plugin's options as environment variables. Raises InputError for a key file that cannot be read."""
    from be_serve.core.errors import InputError

    given = dict(plugin)
    key_file = given.pop("BE_ADMIN_KEY_FILE", None)
    if key_file is not None:
        if given["BE_ADMIN_KEY"]:
            raise InputError("The admin key is given twice, by --be-admin-key and by --be-admin-key-file.")
        try:
            given["BE_ADMIN_KEY"] = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"Cannot read --be-admin-key-file {key_file}: {exc}.") from exc
        if not given["BE_ADMIN_KEY"]:
            raise InputError(f"--be-admin-key-file {key_file} is empty; write the key into it.")
    given["BE_TOKEN"] = "\n".join(given["BE_TOKEN"]) or None
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in given.items()
        if value is not None
    }
