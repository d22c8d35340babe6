"""Which injection a server takes, and what its engine is told."""

from __future__ import annotations

import json

import pytest

from be_serve.core.errors import InputError
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
        ("model-im: transformers\n", "resident-rows"),  # a key is a whole name
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
