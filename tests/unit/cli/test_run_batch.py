"""The command run-batch; vLLM itself answers a batch in tests/integration/test_run_batch.py."""

from __future__ import annotations

import pytest

from be_serve.cli.main import cli, main
from be_serve.cli.run_batch import _made_by
from be_serve.cli.run_batch import command as run_batch_command
from be_serve.cli.serve import command as serve_command
from be_serve.core.errors import InputError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "http://h", "--concurency=8"], "With --url, run-batch does not use MODEL"),
        (["--url", "http://h", "--be-token", "a=b"], "With --url, run-batch does not use --be-token"),
        (["--url", "http://h", "m", "--api-key", "SECRET"], "With --url, run-batch does not use MODEL, --api-key"),
        (["--url", ""], "--url is empty"),
        (["--url", "http://h", "--start-timeout", "5"], "With --url, run-batch does not use --start-timeout"),
        (["m", "--vllm-api-key", "SECRET"], "With its own server, run-batch does not use --vllm-api-key"),
        (["m", "--port=3"], "Omit --port"),
        (["--enforce-eager", "m"], "Give the model before the options"),
    ],
)
def test_a_command_that_would_be_misread_is_refused(tmp_path, words, message):
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    with pytest.raises(InputError, match=message) as caught:
        cli(["run-batch", *files, *words], standalone_mode=False)
    assert "SECRET" not in str(caught.value)


def test_words_of_vllm_behind_one_dash_stay_whole():
    words = ["m", "-dph", "-cc.mode=3", "-tp", "2", "--be-rows", "8", "-O3"]
    context = serve_command.make_context("serve", words)
    assert context.args == ["-dph", "-cc.mode=3", "-tp", "2", "-O3"]
    assert context.params["be_rows"] == 8


def test_values_that_begin_with_a_dash_stay_whole():
    context = serve_command.make_context("serve", ["m", "--be-admin-key", "-Ab12", "--be-token", "-a=b"])
    assert context.params["be_admin_key"] == "-Ab12"
    assert context.params["be_token"] == ("-a=b",)
    context = run_batch_command.make_context("run-batch", ["m", "-iin.jsonl", "-o", "-out.jsonl", "-tp", "2"])
    assert (context.params["input_file"], context.params["output_file"]) == ("in.jsonl", "-out.jsonl")
    assert context.args == ["-tp", "2"]


def test_what_the_answers_depend_on(tmp_path, monkeypatch):
    token, config = tmp_path / "t.safetensors", tmp_path / "c.yaml"
    token.write_bytes(b"one")
    config.write_text("dtype: float32")
    settings = {"BE_TOKEN": f"a={token}"}

    def made_by(arguments=("--config", str(config)), **more):
        return _made_by("m", arguments, settings | more)

    first = made_by()
    assert first == made_by(BE_ADMIN_KEY="secret")
    assert "secret" not in str(made_by(arguments=["--hf-token", "secret"]))
    # Not even a digest of one: short ones can be tried.
    assert made_by(arguments=["--hf-token", "one"]) == made_by(arguments=["--hf-token", "two"])
    assert made_by(BE_REGISTRY="postgresql://u:one@h/d") == made_by(BE_REGISTRY="postgresql://u:two@h/d")
    assert made_by(BE_REGISTRY="postgresql://u:one@h/d") != made_by(BE_REGISTRY="postgresql://u:one@h/e")
    monkeypatch.setenv("BE_MATCH", "0")
    assert first["options"] != made_by()["options"]
    monkeypatch.delenv("BE_MATCH")
    assert first["options"] != made_by(BE_INJECTION="prompt-embeds")["options"]
    config.write_text("dtype: bfloat16")
    second = made_by()
    assert first["files"] != second["files"]
    token.write_bytes(b"two")
    assert second["files"] != made_by()["files"]


def test_the_exit_status_of_a_command_reaches_the_shell(monkeypatch):
    monkeypatch.setattr("be_serve.cli.main.cli", lambda standalone_mode: 3)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
