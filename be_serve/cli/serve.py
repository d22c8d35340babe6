"""`be-serve serve MODEL ...`: vLLM's server with the plugin on."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["-h", "--help"]},
)
@click.argument("model", default="builtin:smollm2-135m-instruct")
@click.option(
    "--be-registry",
    metavar="URL",
    envvar="BE_REGISTRY",
    help="Database URL of the registry. [sqlite in the cache folder]",
)
@click.option("--be-token", multiple=True, metavar="ID=FILE", help="A token held in memory. Repeatable. [BE_TOKEN]")
@click.option("--be-admin-key", metavar="KEY", envvar="BE_ADMIN_KEY", help="Key of the /v1/be routes; none: closed.")
@click.option("--be-admin-key-file", metavar="FILE", help="The same from a file; command lines are seen by others.")
@click.option(
    "--be-injection",
    envvar="BE_INJECTION",
    help="How vectors reach the engine: resident-rows, prompt-embeds, or auto: rows where they are proven. [auto]",
)
@click.option("--be-rows", type=int, envvar="BE_ROWS", help="Rows for vectors on the workers. [1024]")
@click.option("--be-max-upload", type=int, envvar="BE_MAX_UPLOAD", help="Largest token file in bytes. [67108864]")
@click.option(
    "--be-cache-bytes", type=int, envvar="BE_CACHE_BYTES", help="Memory for vectors per API process. [268435456]"
)
@click.option("--be-match/--no-be-match", default=None, help="Serve tokens for their prompt's own text. [BE_MATCH]")
@click.option(
    "--be-inflight-bytes",
    type=int,
    envvar="BE_INFLIGHT_BYTES",
    help="Memory for running requests with tokens per API process. [1073741824]",
)
@click.option(
    "--be-list-aliases/--no-be-list-aliases", default=None, help="Name tokens in /v1/models. [BE_LIST_ALIASES]"
)
@click.option("--be-off", is_flag=True, help="Plain vLLM without the plugin, for comparison.")
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    be_registry: str | None,
    be_token: tuple[str, ...],
    be_admin_key: str | None,
    be_admin_key_file: str | None,
    be_injection: str | None,
    be_rows: int | None,
    be_max_upload: int | None,
    be_cache_bytes: int | None,
    be_match: bool | None,
    be_inflight_bytes: int | None,
    be_list_aliases: bool | None,
    be_off: bool,
) -> None:
    """Serve MODEL (a Hugging Face name, a folder, or a builtin: model).

    Every option of `vllm serve` may follow and is passed on unchanged.
    """
    from be_serve.core.errors import InputError
    from be_serve.models import resolve_model
    from be_serve.serving.launch import choose_injection, vllm_arguments
    from be_serve.serving.settings import Settings

    if be_admin_key_file is not None:
        try:
            be_admin_key = Path(be_admin_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(f"Cannot read --be-admin-key-file {be_admin_key_file}: {exc}.") from exc
    arguments = list(ctx.args)
    if model.startswith("-"):
        raise InputError("Name the model first: be-serve serve MODEL [options].")
    served = model
    if model.startswith("builtin:"):
        served = str(resolve_model(model).path)
        if not any(a.split("=")[0] in ("--served-model-name", "--served_model_name") for a in arguments):
            arguments += ["--served-model-name", model]
    given = {
        "BE_REGISTRY": be_registry,
        "BE_TOKEN": "\n".join(be_token) or None,
        "BE_ADMIN_KEY": be_admin_key,
        "BE_INJECTION": be_injection,
        "BE_ROWS": be_rows,
        "BE_MAX_UPLOAD": be_max_upload,
        "BE_CACHE_BYTES": be_cache_bytes,
        "BE_MATCH": None if be_match is None else int(be_match),
        "BE_INFLIGHT_BYTES": be_inflight_bytes,
        "BE_LIST_ALIASES": None if be_list_aliases is None else int(be_list_aliases),
    }
    # Every API server process reads these; they are how settings reach a plugin.
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    settings = Settings.from_env()

    # Must be set before vLLM is imported: it decides what vLLM loads, in all of its processes.
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    if not plugins:
        from be_serve.serving.vllm_compat import installed_plugins

        plugins = installed_plugins()
    plugins = [name for name in plugins if name != "be_serve"] + ([] if be_off else ["be_serve"])
    os.environ["VLLM_PLUGINS"] = ",".join(plugins)

    from be_serve.serving import vllm_compat

    vllm_compat.check_version()
    if vllm_compat.is_cpu_build():
        vllm_compat.spare_a_core(os.environ)
    if not be_off:
        # vLLM only logs a plugin that fails to load; import it here, where failing is loud.
        import be_serve.serving.plugin  # noqa: F401

        injection = settings.injection
        if injection == "auto":
            injection, reason = choose_injection(served, arguments)
            click.echo(f"be-serve: injection {injection} ({reason}).", err=True)
        os.environ["BE_INJECTION"] = injection
        arguments = vllm_arguments(injection, settings.rows, arguments)
    vllm_compat.run_server([served, *arguments])
