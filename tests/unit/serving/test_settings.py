"""The plugin's options, and how they reach its processes."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from be_serve.cli.options import plugin_options, plugin_variables
from be_serve.cli.serve import command as serve
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


@pytest.mark.parametrize("value", ["", " \n"])
def test_a_key_that_is_set_but_empty_stops_the_server(tmp_path, value):
    file = tmp_path / "key"
    file.write_text("secret")
    for arguments in ((), ("--be-admin-key-file", str(file))):
        result = invoke(*arguments, BE_ADMIN_KEY=value)
        assert isinstance(result.exception, InputError)
        assert str(result.exception) == "BE_ADMIN_KEY is set but empty; unset it or give a key."
    result = CliRunner(env={"VLLM_API_KEY": value}).invoke(serve, ["--be-off"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "VLLM_API_KEY is set but empty; unset it or give a key."
    assert "--be-admin-key is empty" in str(invoke("--be-admin-key", value).exception)


def test_the_same_key_may_come_twice_and_another_is_named_by_its_source(tmp_path):
    file = tmp_path / "key"
    file.write_text("secret\n")
    arguments = ("--be-admin-key-file", str(file))
    assert "BE_ADMIN_KEY=secret\n" in invoke(*arguments, BE_ADMIN_KEY="secret").output
    assert "BE_ADMIN_KEY=secret\n" in invoke(*arguments, "--be-admin-key", "secret").output
    assert "The variable BE_ADMIN_KEY and" in str(invoke(*arguments, BE_ADMIN_KEY="other").exception)
    assert "--be-admin-key and" in str(invoke(*arguments, "--be-admin-key", "other").exception)


def test_the_flag_wins_over_the_environment():
    assert "BE_REQUIRE=1\n" in invoke("--be-require").output
    assert "BE_REQUIRE=0\n" in invoke("--no-be-require", BE_REQUIRE="1").output
    assert "BE_REQUIRE" not in invoke().output
