"""`be-serve VERB ...`: finds the verb's module and turns user errors into one line."""

from __future__ import annotations

import importlib
import sys

import click

from be_serve import __version__
from be_serve.core.errors import BEError

# verb -> (module, one-line help): modules load when their verb runs, so `--help` stays quick.
_VERBS = {
    "train": ("be_serve.cli.train", "Train a token for a system prompt."),
    "train-ae": ("be_serve.cli.train_ae", "Train the universal [AE] token of a model (stage 0)."),
    "from-text": ("be_serve.cli.from_text", "Write a prompt's own embeddings as a token."),
    "eval": ("be_serve.cli.eval", "Measure a token beside no prompt and the full prompt."),
    "compare": ("be_serve.cli.compare", "Train methods beside each other on one prompt."),
    "probe": ("be_serve.cli.probe", "Measure how many bits a vector of a model holds."),
    "fit": ("be_serve.cli.fit", "Estimate whether a prompt fits into a few vectors."),
    "inspect": ("be_serve.cli.inspect", "Show and check a token file."),
    "serve": ("be_serve.cli.serve", "Serve a model on vLLM with the be_id plugin."),
    "run-batch": ("be_serve.cli.run_batch", "Answer a file of requests without a server."),
    "register": ("be_serve.cli.register", "Upload a token to a running server."),
    "list": ("be_serve.cli.list", "List a server's tokens."),
    "show": ("be_serve.cli.show", "Show one token of a server."),
    "remove": ("be_serve.cli.remove", "Remove a token from a server."),
    "bench": ("be_serve.cli.bench", "Measure a server, under load too, or a training step."),
    "model": ("be_serve.cli.model", "Prepare a model and print its folder and fingerprint."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command: click.Command = importlib.import_module(_VERBS[name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, text) for verb, (_, text) in _VERBS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="be-serve")
def cli() -> None:
    """Replace a long system prompt by a few learned input embeddings."""


def main() -> None:
    """Console entry point. Exit status 2 for user errors, 130 after Ctrl-C, else the command's own."""
    try:
        status = cli(standalone_mode=False)  # what a command gave click.exceptions.Exit
    except BEError as exc:
        click.secho(f"be-serve: {exc}", fg="red", err=True)
        sys.exit(2)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("be-serve: interrupted.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as exc:
        extra = {"torch": "train", "transformers": "train", "vllm": "serve", "matplotlib": "bench"}.get(exc.name or "")
        if extra is None:
            raise
        click.secho(
            f"be-serve: this verb needs {exc.name}, which the extra [{extra}] brings: `make install` in a checkout, "
            f"or pip install -e '.[{extra}]'.",
            fg="red",
            err=True,
        )
        sys.exit(2)
    if isinstance(status, int):
        sys.exit(status)


if __name__ == "__main__":
    main()
