"""Command-line options that several commands share. The experiments use them too."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from trainer.model.frozen import FrozenModel

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
seed_option = click.option("--seed", type=int, default=0, show_default=True)


@dataclass(frozen=True)
class ModelChoice:
    """The model that `--model`, `--device` and `--dtype` select."""

    name: str | None
    device: str
    dtype: str

    def load(self) -> FrozenModel:
        """Return the frozen model; without a name, the built-in model. Raises InputError."""
        from be_serve.models import DEFAULT_MODEL, resolve_model
        from trainer.model.frozen import FrozenModel

        found = resolve_model(self.name or DEFAULT_MODEL)
        return FrozenModel.load(
            found.path, name=found.name, revision=found.revision, device=self.device, dtype=self.dtype
        )


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--model`, `--device` and `--dtype`; the command receives a `ModelChoice` as its argument `model`."""

    @click.option(
        "--model", help="Hugging Face name, folder, .gguf file or builtin:NAME. [default: the built-in model]"
    )
    @click.option("--device", default="auto", show_default=True)
    @click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), default="auto")
    @functools.wraps(command)
    def wrapped(*args: Any, model: str | None, device: str, dtype: str, **kwargs: Any) -> None:
        command(*args, model=ModelChoice(model, device, dtype), **kwargs)

    return wrapped


def _required(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
    if not value:
        raise click.UsageError("Set BE_ADMIN_KEY or give --admin-key: the admin key that the server was started with.")
    return value


def remote_server_options(function: F) -> F:
    """Add `--url`, `--admin-key` (also `--api-key`) and `--vllm-api-key`, for commands that call a running server."""
    for option in (
        click.option(
            "--vllm-api-key",
            envvar="VLLM_API_KEY",
            help="vLLM's own API key, if the server was started with --api-key.",
        ),
        click.option(
            "--admin-key",
            "--api-key",
            "api_key",
            envvar="BE_ADMIN_KEY",
            callback=_required,
            help="The server's admin key. The variable BE_ADMIN_KEY keeps the key out of the process list.",
        ),
        click.option("--url", envvar="BE_URL", default="http://127.0.0.1:8000", show_default=True, show_envvar=True),
    ):
        function = option(function)
    return function


def split_flags(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Split each argument into shell words, so that one argument can hold `--FLAG VALUE`."""
    return tuple(word for value in values for word in shlex.split(value))


def benchmark_server_options(function: F) -> F:
    """Add `--server-arg` (flags for both servers) and `--plugin-arg` (flags for the server with the plugin)."""
    for option in (
        click.option(
            "--plugin-arg",
            "plugin_args",
            multiple=True,
            callback=split_flags,
            metavar="'--FLAG VALUE'",
            help="Flag for the plugin server only, for example --be-injection. Repeatable.",
        ),
        click.option(
            "--server-arg",
            "server_args",
            multiple=True,
            callback=split_flags,
            metavar="'--FLAG VALUE'",
            help="vLLM flag for both servers that the benchmark starts. Overrides the benchmark's flag. Repeatable.",
        ),
    ):
        function = option(function)
    return function


def plugin_options(function: F) -> F:
    """Add the plugin's options; the command receives them as `plugin`: environment variable name -> value."""
    options = (
        click.option(
            "--be-registry",
            metavar="URL",
            envvar="BE_REGISTRY",
            help="Database URL of the registry. [sqlite in the cache folder]",
        ),
        click.option(
            "--be-token",
            multiple=True,
            metavar="ID=FILE",
            help="Load a token into memory, outside the registry. Repeatable. [BE_TOKEN]",
        ),
        click.option(
            "--be-admin-key",
            metavar="KEY",
            envvar="BE_ADMIN_KEY",
            help="Key for the /v1/be routes. Without a key, the routes are disabled.",
        ),
        click.option(
            "--be-admin-key-file",
            metavar="FILE",
            envvar="BE_ADMIN_KEY_FILE",
            help="Read the admin key from a file. Other users can read a key on the command line.",
        ),
        click.option(
            "--be-injection",
            envvar="BE_INJECTION",
            help="How vectors reach the engine: resident-rows, prompt-embeds or auto. auto uses resident-rows if they "
            "are proven for the model. [auto]",
        ),
        click.option("--be-rows", type=int, envvar="BE_ROWS", help="Rows for vectors on the workers. [1024]"),
        click.option(
            "--be-max-upload", type=int, envvar="BE_MAX_UPLOAD", help="Maximum token file size in bytes. [67108864]"
        ),
        click.option(
            "--be-cache-bytes",
            type=int,
            envvar="BE_CACHE_BYTES",
            help="Maximum memory for cached vectors in each API process, in bytes. [268435456]",
        ),
        click.option(
            "--be-match/--no-be-match",
            default=None,
            help="Use a token for a request whose system message is exactly the token's prompt. [BE_MATCH]",
        ),
        click.option(
            "--be-require/--no-be-require",
            default=None,
            help="Refuse (403) chats without a token and endpoints that do not support tokens. [BE_REQUIRE]",
        ),
        click.option(
            "--be-inflight-bytes",
            type=int,
            envvar="BE_INFLIGHT_BYTES",
            help="Maximum memory for running requests with tokens in each API process, in bytes. [1073741824]",
        ),
        click.option(
            "--be-list-aliases/--no-be-list-aliases", default=None, help="List tokens in /v1/models. [BE_LIST_ALIASES]"
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


def refuse_empty_key(variable: str) -> None:
    """Raise InputError if an environment variable for a key is set to nothing: the server would start without it."""
    from be_serve.core.errors import InputError

    if not os.environ.get(variable, "unset").strip():
        raise InputError(f"{variable} is set but empty; unset it or give a key.")


def plugin_variables(plugin: dict[str, Any]) -> dict[str, str]:
    """Return the plugin's options as environment variables.

    Raises InputError for a key file that cannot be read, for an empty key, and for two different admin keys.
    """
    from be_serve.core.errors import InputError

    refuse_empty_key("BE_ADMIN_KEY")
    given = dict(plugin)
    key, key_file = given["BE_ADMIN_KEY"], given.pop("BE_ADMIN_KEY_FILE", None)
    if key is not None and not key.strip():
        raise InputError("--be-admin-key is empty. Omit it or give a key.")
    if key_file is not None:
        try:
            given["BE_ADMIN_KEY"] = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"Cannot read --be-admin-key-file {key_file}: {exc}.") from exc
        if not given["BE_ADMIN_KEY"]:
            raise InputError(f"--be-admin-key-file {key_file} is empty. Write the key into the file.")
        if key is not None and key.strip() != given["BE_ADMIN_KEY"]:
            source = "The variable BE_ADMIN_KEY" if key == os.environ.get("BE_ADMIN_KEY") else "--be-admin-key"
            raise InputError(
                f"{source} and --be-admin-key-file {key_file} hold different admin keys. Give one of them, not both."
            )
    given["BE_TOKEN"] = "\n".join(given["BE_TOKEN"]) or None
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in given.items()
        if value is not None
    }
