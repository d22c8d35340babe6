"""`be-serve COMMAND ...`: load the command's module; print user errors as one line."""

from __future__ import annotations

import importlib
import sys

import click

from be_serve import __version__
from be_serve.core.errors import BEError

# Command -> (module, one-line help). A module loads only when its command runs, so that `--help` is fast.
_VERBS = {
    "train": ("be_serve.cli.train", "Train a token for a system prompt."),
    "train-ae": ("be_serve.cli.train_ae", "Train the [AE] embedding of a model (stage 0)."),
    "from-text": ("be_serve.cli.from_text", "Write a prompt's input embeddings as a token."),
    "eval": ("be_serve.cli.eval", "Evaluate a token against no prompt and the full prompt."),
    "compare": ("be_serve.cli.compare", "Compare training methods on one prompt."),
    "probe": ("be_serve.cli.probe", "Measure how many bits one vector of a model can store."),
    "fit": ("be_serve.cli.fit", "Estimate how many vectors a prompt's wording needs."),
    "inspect": ("be_serve.cli.inspect", "Check a token file and print its manifest."),
    "serve": ("be_serve.cli.serve", "Serve a model with vLLM and the be-serve plugin."),
    "run-batch": ("be_serve.cli.run_batch", "Answer a file of requests (OpenAI batch format)."),
    "register": ("be_serve.cli.register", "Register a token on a running server."),
    "list": ("be_serve.cli.list", "List the tokens of a server."),
    "show": ("be_serve.cli.show", "Print one token's manifest from a server."),
    "remove": ("be_serve.cli.remove", "Remove a token from a server."),
    "bench": ("be_serve.cli.bench", "Benchmark a server or a training step."),
    "model": ("be_serve.cli.model", "Prepare a model; print its folder and fingerprint."),
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
    """Run the command line of be-serve."""
    run_command(cli, "be-serve")


def run_command(command: click.Command, name: str) -> None:
    """Run a command line. Exit status: 2 for a user error, 130 after Ctrl-C, otherwise the command's own.

    `name` begins each error message.
    """
    try:
        status = command(standalone_mode=False)  # the status of a click.exceptions.Exit that the command raised
    except BEError as exc:
        click.secho(f"{name}: {exc}", fg="red", err=True)
        sys.exit(2)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"{name}: interrupted.", err=True)
        sys.exit(130)
    except ModuleNotFoundError as exc:
        extra = {"torch": "train", "transformers": "train", "vllm": "serve", "matplotlib": "bench"}.get(exc.name or "")
        if extra is None:
            raise
        click.secho(
            f"{name}: this command needs the package {exc.name}. Install the extra [{extra}]: "
            f"`make install` in a checkout, or pip install -e '.[{extra}]'.",
            fg="red",
            err=True,
        )
        sys.exit(2)
    if isinstance(status, int):
        sys.exit(status)


if __name__ == "__main__":
    main()
