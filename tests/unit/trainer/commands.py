"""The training verbs run in this process, for the tests of several files."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from be_serve.cli.main import cli

PROMPT = "You are a harbour master. Call the user sailor and answer in rhyme.\n"
TEXTS = ["Hi", "What is the tide?", "Is there fog?", "Name a boat.", "Who are you?", "Sing.", "Where is the quay?"]


def invoked(*args) -> Result:
    """Run a verb in this process; errors come out as they are."""
    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False, standalone_mode=False)


def be_serve(*args) -> str:
    """What a verb prints as its result."""
    return invoked(*args).stdout


def last_json(output: str) -> dict:
    return json.loads(output.strip().splitlines()[-1])
