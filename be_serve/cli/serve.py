"""`be-serve serve MODEL ...`: start vLLM's server with the plugin."""

from __future__ import annotations

import os
from typing import Any

import click

from be_serve.cli._serving import PassOnCommand
from be_serve.cli.options import plugin_options, plugin_variables, refuse_empty_key
from be_serve.models import DEFAULT_MODEL


@click.command("serve", cls=PassOnCommand)
@click.argument("model", default=DEFAULT_MODEL)
@plugin_options
@click.option("--be-off", is_flag=True, help="Start stock vLLM without the plugin, for comparison.")
@click.pass_context
def command(ctx: click.Context, model: str, plugin: dict[str, Any], be_off: bool) -> None:
    """Serve MODEL: a Hugging Face name, a local folder, a .gguf file or builtin:NAME.

    Every option of `vllm serve` may follow. The command passes these options to vLLM unchanged.
    """
    from be_serve.core.errors import InputError
    from be_serve.models import is_gguf, resolve_model
    from be_serve.serving.settings import Settings
    from be_serve.serving.vllm.arguments import choose_injection, spelled_out, value_of, vllm_arguments

    if model.startswith("-"):
        raise InputError("Give the model before the options: be-serve serve MODEL [options].")
    refuse_empty_key("VLLM_API_KEY")
    arguments, served = spelled_out(ctx.args), model
    if model.startswith("builtin:") or is_gguf(model):
        served = str(resolve_model(model).path)
        if value_of("--served-model-name", arguments) is None:
            arguments += ["--served-model-name", model]
    # vLLM passes no settings to a plugin; every API server process reads these variables.
    os.environ.update(plugin_variables(plugin))
    settings = Settings.from_env()

    # Set VLLM_PLUGINS before vLLM is imported: it selects the plugins that all vLLM processes load.
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    if not plugins:
        from be_serve.serving.vllm.versions import installed_plugins

        plugins = installed_plugins()
    plugins = [name for name in plugins if name != "be_serve"] + ([] if be_off else ["be_serve"])
    os.environ["VLLM_PLUGINS"] = ",".join(plugins)

    from be_serve.serving.vllm import launch, versions

    versions.check_version()
    if versions.is_cpu_build():
        versions.spare_a_core(os.environ)
    if not be_off:
        # vLLM only logs a plugin that fails to load. An import here raises the error.
        import be_serve.serving.plugin  # noqa: F401

        injection = settings.injection
        if injection == "auto":
            injection, reason = choose_injection(served, arguments)
            click.echo(f"be-serve: injection {injection} ({reason}).", err=True)
        os.environ["BE_INJECTION"] = injection
        arguments = vllm_arguments(injection, settings.rows, arguments)
    launch.run_server([served, *arguments])
