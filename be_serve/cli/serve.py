"""`be-serve serve MODEL ...`: vLLM's server with the plugin on."""

from __future__ import annotations

from typing import Any

import click

from be_serve.cli._serving import PASS_ON, prepare, takes_plugin_options


@click.command("serve", context_settings=PASS_ON)
@click.argument("model", default="builtin:smollm2-135m-instruct")
@takes_plugin_options
@click.option("--be-off", is_flag=True, help="Plain vLLM without the plugin, for comparison.")
@click.pass_context
def command(ctx: click.Context, model: str, plugin: dict[str, Any], be_off: bool) -> None:
    """Serve MODEL (a Hugging Face name, a folder, or a builtin: model).

    Every option of `vllm serve` may follow and is passed on unchanged.
    """
    arguments = prepare(model, ctx.args, plugin, off=be_off)

    from be_serve.serving.vllm_app import run_server

    run_server(arguments)
