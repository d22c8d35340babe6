"""Which injection a server takes, and what its engine is told."""

from __future__ import annotations

import json

import pytest

from be_serve.core.errors import InputError
from be_serve.serving.vllm import arguments as module
from be_serve.serving.vllm.arguments import choose_injection, spelled_out, value_of, vllm_arguments


def test_a_proven_model_takes_resident_rows(tiny_model_dir):
    name, reason = choose_injection(str(tiny_model_dir), ["--port", "8000"])
    assert name == "resident-rows"
    assert "LlamaForCausalLM" in reason
    assert choose_injection(str(tiny_model_dir), ["--enable-lora", "--data-parallel-size", "2"])[0] == "resident-rows"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--speculative-config", "{}"], "draft"),
        (["--speculative_config.method=ngram"], "draft"),
        (["-sc", "{}"], "draft"),
        (["-sc.method=ngram"], "draft"),
        (["--spec-method", "ngram"], "draft"),
        (["--kv-transfer-config={}"], "two tokens that used the same row"),
        (["--kv-offloading-size=4"], "two tokens that used the same row"),
        (["--speculative", "{}"], "draft"),
        (["--logits-processors", "x:Y"], "see the ids"),
        (["--model-impl", "transformers"], "implementation"),
        (["--enable-prompt-embeds"], "asks for"),
    ],
)
def test_what_rows_are_not_proven_with_takes_prompt_embeds(tiny_model_dir, arguments, word):
    name, reason = choose_injection(str(tiny_model_dir), arguments)
    assert name == "prompt-embeds"
    assert word in reason


def test_options_in_a_config_file_count(tiny_model_dir, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 8000\nspeculative_config: '{}'\n")
    assert choose_injection(str(tiny_model_dir), ["--config", str(file)])[0] == "prompt-embeds"
    file.write_text("port: 8000\n")
    assert choose_injection(str(tiny_model_dir), ["--config", str(file)])[0] == "resident-rows"
    with pytest.raises(InputError, match="--config"):
        choose_injection(str(tiny_model_dir), ["--config", str(tmp_path / "none.yaml")])


def test_additional_config_in_a_file_is_kept(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("additional_config: {a: 1}\n")
    made = vllm_arguments("resident-rows", 64, ["--config", str(file)])
    assert json.loads(made[made.index("--additional-config") + 1]) == {"a": 1, "be_rows": 64}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: some/model\n", "resident-rows"),
        ("model-im: transformers\n", "prompt-embeds"),  # argparse reads an abbreviated key, too
        ("speculative-conf: {method: ngram}\n", "prompt-embeds"),
        ("kv_transfer_conf: {}\n", "prompt-embeds"),
        ("logits-proc: [x:Y]\n", "prompt-embeds"),
        ("enable-prompt: true\n", "prompt-embeds"),
        ("enable-prompt-tokens-details: true\n", "resident-rows"),
        ("speculative-conf.method: ngram\n", "prompt-embeds"),
        ("enable-prompt-embeds: false\n", "resident-rows"),
        ("logits_processors: []\n", "resident-rows"),
        ("compilation-config: {speculative-config: {}}\n", "resident-rows"),
        ("", "resident-rows"),
        ("model-impl: transformers\n", "prompt-embeds"),
        ("enable_prompt_embeds: true\n", "prompt-embeds"),
        ("speculative-config: {method: ngram}\n", "prompt-embeds"),
        ("speculative-config.method: ngram\n", "prompt-embeds"),
    ],
)
def test_a_config_file_is_read_as_vllm_reads_it(tiny_model_dir, tmp_path, text, expected):
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    assert choose_injection(str(tiny_model_dir), ["--config", str(file)])[0] == expected


def test_a_whole_name_is_no_short_one(tiny_model_dir):
    for words in (["--model", "other"], ["--model=other"]):
        assert choose_injection(str(tiny_model_dir), words)[0] == "resident-rows"
    assert choose_injection(str(tiny_model_dir), ["--model-im", "transformers"])[0] == "prompt-embeds"


def test_false_in_a_config_file_leaves_vllms_flag_to_be_given(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("enable-prompt-embeds: false\n")
    assert vllm_arguments("prompt-embeds", 64, ["--config", str(file)])[-1] == "--enable-prompt-embeds"
    file.write_text("enable-prompt-embeds: true\n")
    assert vllm_arguments("prompt-embeds", 64, ["--config", str(file)]) == ["--config", str(file)]


def test_additional_config_by_keys_of_a_file_is_kept(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("additional_config.a: 1\n")
    made = vllm_arguments("resident-rows", 64, ["--config", str(file)])
    assert made[-2:] == ["--additional-config.be_rows", "64"]


def test_values_come_from_the_command_line_before_the_file(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("served_model_name: [inside, second]\nrevision: v1\n")
    words = ["--config", str(file)]
    assert value_of("--revision", words) == "v1"
    assert value_of("--revision", [*words, "--revision=v2"]) == "v2"
    assert value_of("--revision", ["--revision", "v3", *words]) == "v3"
    assert value_of("--served-model-name", words) is not None
    assert value_of("--served-model-name", ["--served_model_name", "x"]) == "x"
    assert value_of("--revision", []) is None


def test_a_config_file_in_one_word_is_read_too(tmp_path):
    """vLLM looks for `--config` alone and would start without what stands in the file."""
    assert spelled_out(["--config=a=b.yaml", "--port=1", "-tp"]) == ["--config", "a=b.yaml", "--port=1", "-tp"]


def test_an_unproven_architecture_takes_prompt_embeds(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OddForCausalLM"], "model_type": "odd"}))
    name, reason = choose_injection(str(tmp_path), [])
    assert name == "prompt-embeds"
    assert "OddForCausalLM" in reason
    with pytest.raises(InputError, match="name the injection: --be-injection resident-rows or prompt-embeds"):
        choose_injection(str(tmp_path / "missing"), [])


def test_the_engine_is_told_of_its_rows():
    assert vllm_arguments("resident-rows", 64, ["--port", "1"]) == [
        "--port", "1", "--additional-config", '{"be_rows": 64}'
    ]  # fmt: skip
    for given in (["--additional-config", '{"a": 1}', "-v"], ['--additional_config={"a": 1}', "-v"]):
        made = vllm_arguments("resident-rows", 64, given)
        assert json.loads(made[made.index("--additional-config") + 1]) == {"a": 1, "be_rows": 64}
        assert made[-1] == "-v"
    assert vllm_arguments("resident-rows", 64, ["--additional-config.a", "1"])[-2:] == [
        "--additional-config.be_rows", "64"
    ]  # fmt: skip
    assert vllm_arguments("resident-rows", 8, ["--additional", "{}"]) == ["--additional-config", '{"be_rows": 8}']
    with pytest.raises(InputError, match="JSON object"):
        vllm_arguments("resident-rows", 64, ["--additional-config", "[1]"])


def test_prompt_embeds_need_vllms_flag_once():
    assert vllm_arguments("prompt-embeds", 64, []) == ["--enable-prompt-embeds"]
    assert vllm_arguments("prompt-embeds", 64, ["--enable_prompt_embeds"]) == ["--enable_prompt_embeds"]


def test_whole_names_are_those_of_vllms_parser():
    """A name of vLLM that begins an option of ours is in the set, so that it counts as itself."""
    pytest.importorskip("vllm")
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    names = {name for action in make_arg_parser(FlexibleArgumentParser())._actions for name in action.option_strings}
    asked = {*module._UNPROVEN_WITH, module._ADDITIONAL, "--revision", "--served-model-name"}
    found = {name for name in names for option in asked if option.startswith(name) and name != option}
    assert found - {"-"} == module._WHOLE_NAMES


SECRET_FILES = [
    'port: 1\napi-key: "sk-live-hunter2\n',
    "api-key: [sk-live-hunter2",
    "api-key: sk-live: hunter2",
    "api-key: !sk-live-hunter2 x",
    "api-key: !it's-sk-live-hunter2 x",
    "api-key: *sk-live-hunter2",
    "api-key: @sk-live-hunter2",
    "api-key: %sk-live-hunter2",
    'api-key: "\\hunter2"',
    "hf-token: sk-live-hunter2\n? [a]\n: 1\n",
    "api-key: sk-live-hunter2\nsince: 2026-13-01\n",
    "api-key: sk-live-hunter2\x00\n",
]


@pytest.mark.parametrize("text", SECRET_FILES)
def test_a_broken_config_file_shows_no_value(tmp_path, text):
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="Cannot read --config") as caught:
        vllm_arguments("resident-rows", 64, ["--config", str(file)])
    assert "hunter2" not in str(caught.value)
    assert "sk-live" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_place_of_a_fault_in_a_config_file_is_told(tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 1\napi-key: x: y\n")
    with pytest.raises(InputError, match="mapping values are not allowed here in line 2, column 11"):
        vllm_arguments("resident-rows", 64, ["--config", str(file)])


def test_additional_config_that_is_no_json_is_refused(tmp_path):
    file = tmp_path / "vllm.yaml"
    for text in ("additional-config: {since: 2026-01-01}\n", "additional-config: &a {b: *a}\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="JSON"):
            vllm_arguments("resident-rows", 64, ["--config", str(file)])


@pytest.mark.parametrize(
    ("text", "words", "end"),
    [
        ("additional-conf: {a: 1}\n", [], ["--additional-config", '{"a": 1, "be_rows": 8}']),
        ("additional-conf.a: 1\n", [], ["--additional-conf.be_rows", "8"]),
        ("port: 1\n", ["--additional-conf.a", "1"], ["--additional-conf.be_rows", "8"]),
        (
            "port: 1\n",
            ["--additional-config={}", "--add", '{"a": 1}'],
            ["--additional-config", '{"a": 1, "be_rows": 8}'],
        ),
    ],
)
def test_an_abbreviated_additional_config_is_kept(tmp_path, text, words, end):
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    assert vllm_arguments("resident-rows", 8, ["--config", str(file), *words])[-2:] == end
