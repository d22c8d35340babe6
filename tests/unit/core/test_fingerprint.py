import json
import shutil

import pytest

from be_serve.core.errors import InputError
from be_serve.core.fingerprint import fingerprint_folder


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "m")


def test_stable_and_indifferent_to_how_it_was_written(folder):
    first = fingerprint_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = "0.0"
    config["dtype"] = "float16"
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    assert fingerprint_folder(folder) == first


def test_each_part_shows(folder):
    first = fingerprint_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert first.differing(fingerprint_folder(folder)) == ["config"]

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<other>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert first.differing(fingerprint_folder(folder)) == ["config", "tokenizer"]

    weights = bytearray((folder / "model.safetensors").read_bytes())
    header = int.from_bytes(weights[:8], "little")
    entry = json.loads(weights[8 : 8 + header])["model.embed_tokens.weight"]
    weights[8 + header + entry["data_offsets"][0]] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert first.differing(fingerprint_folder(folder)) == ["config", "tokenizer", "embedding"]


def test_a_servers_template_counts(folder):
    first = fingerprint_folder(folder)
    assert first.differing(fingerprint_folder(folder, chat_template="{{ messages }}")) == ["chat_template"]


def test_errors_say_what_is_missing(folder, tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        fingerprint_folder(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        fingerprint_folder(folder)
