"""What `serve` and `run-batch` share: the plugin's options, and an environment in which vLLM loads it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

PASS_ON = {
    "ignore_unknown_options": True,
    "allow_extra_args": True,
    "help_option_names": ["-h", "--help"],
}
"""Context settings of a verb that hands the options it does not know to vLLM."""


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
            "--be-admin-key-file", metavar="FILE", help="The same from a file; command lines are seen by others."
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


def prepare(model: str, arguments: Sequence[str], plugin: dict[str, Any], *, off: bool = False) -> list[str]:
    """Set this process up for vLLM with the plugin; returns vLLM's arguments, the model first.

    Must be called before vLLM is imported: the environment decides what vLLM loads,
    in all of its processes. Raises InputError for options that do not fit together.
    """
    from be_serve.core.errors import InputError
    from be_serve.models import resolve_model
    from be_serve.serving.launch import choose_injection, vllm_arguments
    from be_serve.serving.settings import Settings

    if model.startswith("-"):
        raise InputError(f"Name the model before its options; {model} stands where it is expected.")
    arguments, served = list(arguments), model
    if model.startswith("builtin:"):
        served = str(resolve_model(model).path)
        if not any(a.split("=")[0] in ("--served-model-name", "--served_model_name") for a in arguments):
            arguments += ["--served-model-name", model]
    # Every API server process reads these; they are how settings reach a plugin.
    os.environ.update(_variables(plugin))
    settings = Settings.from_env()

    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    if not plugins:
        from be_serve.serving.vllm_compat import installed_plugins

        plugins = installed_plugins()
    plugins = [name for name in plugins if name != "be_serve"] + ([] if off else ["be_serve"])
    os.environ["VLLM_PLUGINS"] = ",".join(plugins)

    from be_serve.serving import vllm_compat

    vllm_compat.check_version()
    if vllm_compat.is_cpu_build():
        vllm_compat.spare_a_core(os.environ)
    if not off:
        # vLLM only logs a plugin that fails to load; import it here, where failing is loud.
        import be_serve.serving.plugin  # noqa: F401

        injection = settings.injection
        if injection == "auto":
            injection, reason = choose_injection(served, arguments)
            click.echo(f"be-serve: injection {injection} ({reason}).", err=True)
        os.environ["BE_INJECTION"] = injection
        arguments = vllm_arguments(injection, settings.rows, arguments)
    return [served, *arguments]


def _variables(plugin: dict[str, Any]) -> dict[str, str]:
    """Settings as variables. Raises InputError for a key file that cannot be read."""
    from be_serve.core.errors import InputError

    given = dict(plugin)
    key_file = given.pop("BE_ADMIN_KEY_FILE", None)
    if key_file is not None:
        try:
            given["BE_ADMIN_KEY"] = Path(key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"Cannot read --be-admin-key-file {key_file}: {exc}.") from exc
    given["BE_TOKEN"] = "\n".join(given["BE_TOKEN"]) or None
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in given.items()
        if value is not None
    }
