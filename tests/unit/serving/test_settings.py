"""The plugin's options, and how they reach its processes."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from be_serve.cli.options import plugin_options, plugin_variables
from be_serve.core.errors import InputError


@click.command()
@plugin_options
def show(plugin):
    for name, value in sorted(plugin_variables(plugin).items()):
        click.echo(f"{name}={value}")


def invoke(*arguments, **env):
    return CliRunner(env=env).invoke(show, arguments)


def test_the_key_comes_from_a_file_by_option_or_environment(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    for result in (invoke("--be-admin-key-file", str(file)), invoke(BE_ADMIN_KEY_FILE=str(file))):
        assert "BE_ADMIN_KEY=secret\n" in result.output
        assert "FILE" not in result.output


@pytest.mark.parametrize(
    ("content", "key", "word"), [("", None, "empty"), (" \n", None, "empty"), ("secret", "other", "not both")]
)
def test_a_key_that_would_not_be_the_one_meant_is_refused(tmp_path, content, key, word):
    file = tmp_path / "key"
    file.write_text(content)
    arguments = ["--be-admin-key-file", str(file), *(["--be-admin-key", key] if key else [])]
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert word in str(result.exception)


def test_the_flag_wins_over_the_environment():
    assert "BE_REQUIRE=1\n" in invoke("--be-require").output
    assert "BE_REQUIRE=0\n" in invoke("--no-be-require", BE_REQUIRE="1").output
    assert "BE_REQUIRE" not in invoke().output
