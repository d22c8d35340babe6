"""What a token file is refused for, and that nothing but a BEError ever comes out of one."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from be_serve.core.artifact import (
    MANIFEST_KEY,
    TENSOR_NAME,
    BaseModelRef,
    Manifest,
    PromptRef,
    Token,
    check_vectors,
    file_digest,
    read_manifest,
    tensor_sha256,
)
from be_serve.core.errors import ArtifactTooLarge, BEError, InputError, InvalidArtifact, WrongModel
from be_serve.core.fingerprint import Fingerprint

MADE_FOR = Fingerprint(config="a" * 16, tokenizer="b" * 16, chat_template="c" * 16, embedding="d" * 16)
OTHER = Fingerprint(config="a" * 16, tokenizer="b" * 16, chat_template="c" * 16, embedding="e" * 16)
VECTORS = np.linspace(-1, 1, 24, dtype=np.float32).reshape(3, 8)


def make_manifest(**changes) -> Manifest:
    values = {
        "id": "captain",
        "base_model": BaseModelRef(name="tiny", fingerprint=MADE_FOR),
        "hidden_size": 8,
        "k": 3,
        "template_digest": MADE_FOR.chat_template,
        "prompt": PromptRef(sha256="0" * 64, tokens=200),
        "recipe": {"steps": 5},
        "seed": 0,
    }
    return Manifest(**{**values, **changes})


def make_file(tensors=None, manifest=None, metadata=None) -> bytes:
    """A token file with any part replaced."""
    tensors = {TENSOR_NAME: VECTORS} if tensors is None else tensors
    if manifest is None:
        first = next(iter(tensors.values()))
        digest = tensor_sha256(first) if first.dtype == np.float32 and first.size else "0" * 64
        manifest = json.loads(make_manifest(tensor_sha256=digest).model_dump_json())
    return save_safetensors(tensors, metadata={MANIFEST_KEY: json.dumps(manifest)} if metadata is None else metadata)


GOOD = Token(make_manifest(), VECTORS).to_bytes()


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "captain.safetensors"
    digest = Token(make_manifest(), VECTORS).save(path)
    assert digest == file_digest(path.read_bytes())
    token = Token.load(path)
    assert np.array_equal(token.vectors, VECTORS)
    assert token.manifest.recipe == {"steps": 5}
    assert token.manifest.tensor_sha256 == tensor_sha256(VECTORS)
    assert read_manifest(path) == token.manifest
    assert token.manifest.prompt.text is None
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, len(GOOD) - 1])
def test_truncated(keep):
    with pytest.raises(InvalidArtifact):
        Token.from_bytes(GOOD[:keep])


def test_too_large(tmp_path):
    with pytest.raises(ArtifactTooLarge, match="at most 100"):
        Token.from_bytes(GOOD, max_bytes=100)
    path = tmp_path / "t.safetensors"
    path.write_bytes(GOOD)
    with pytest.raises(ArtifactTooLarge):
        Token.load(path, max_bytes=100)


def test_a_header_that_claims_to_be_huge():
    """Of a file that is long enough for it, it is a header; of any other it is no header at all."""
    with pytest.raises(InvalidArtifact, match=r"not a \.safetensors file"):
        Token.from_bytes(struct.pack("<Q", 1 << 60) + GOOD[8:])
    with pytest.raises(InvalidArtifact, match="larger than 1 MiB"):
        Token.from_bytes(struct.pack("<Q", (1 << 20) + 1) + b" " * (1 << 21))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"You are a harbour master. Answer in rhyme.",
        b'{"id": "harbor", "file": "..."}',
        b"PK\x03\x04\x14\x00\x00\x00\x08\x00 pytorch_model.bin",
        b"--------------------------d74496d66958873e\r\nContent-Disposition: form-data; name=file\r\n\r\n" + GOOD,
    ],
)
def test_what_is_no_safetensors_file_is_called_so(data, tmp_path):
    with pytest.raises(InvalidArtifact, match=r"not a \.safetensors file.*be-serve train.*--data-binary"):
        Token.from_bytes(data)
    (tmp_path / "t.safetensors").write_bytes(data)
    with pytest.raises(InvalidArtifact, match=r"not a \.safetensors file"):
        read_manifest(tmp_path / "t.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="No token file"):
        Token.load(tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match="Cannot read"):
        read_manifest(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_wrong_dtype(dtype):
    with pytest.raises(InvalidArtifact, match="must be float32"):
        Token.from_bytes(make_file({TENSOR_NAME: VECTORS.astype(dtype)}))


@pytest.mark.parametrize("shape", [(24,), (1, 3, 8), (4, 6), (0, 8)])
def test_wrong_shape(shape):
    vectors = np.zeros(shape, dtype=np.float32)
    with pytest.raises(InvalidArtifact):
        Token.from_bytes(make_file({TENSOR_NAME: vectors}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    vectors = VECTORS.copy()
    vectors[1, 2] = value
    with pytest.raises(InvalidArtifact, match="NaN or Inf"):
        Token.from_bytes(make_file({TENSOR_NAME: vectors}))
    with pytest.raises(InvalidArtifact, match="NaN or Inf"):
        Token(make_manifest(), vectors).to_bytes()


def test_inf_only_after_the_cast_to_the_serving_dtype():
    vectors = VECTORS.copy()
    vectors[0, 0] = 70_000.0
    check_vectors(vectors, dtype="bfloat16")
    with pytest.raises(InvalidArtifact, match="becomes Inf in the serving dtype float16"):
        check_vectors(vectors, dtype="float16")
    with pytest.raises(InvalidArtifact, match="not supported"):
        check_vectors(vectors, dtype="int8")


def test_extra_or_missing_tensors():
    with pytest.raises(InvalidArtifact, match="exactly one tensor"):
        Token.from_bytes(make_file({TENSOR_NAME: VECTORS, "more": VECTORS}))
    with pytest.raises(InvalidArtifact, match="exactly one tensor"):
        Token.from_bytes(make_file({"other": VECTORS}))


def test_unknown_format_version():
    manifest = {**json.loads(make_manifest().model_dump_json()), "format_version": 2}
    with pytest.raises(InvalidArtifact, match=r"version 2; this be-serve reads version 1"):
        Token.from_bytes(make_file(manifest=manifest))


@pytest.mark.parametrize(
    "change",
    [{"id": "No Good"}, {"k": 0}, {"k": 4}, {"hidden_size": 9}, {"surprise": 1}, {"prompt": {"sha256": "x"}}],
)
def test_invalid_manifest(change):
    manifest = json.loads(make_manifest(tensor_sha256=tensor_sha256(VECTORS)).model_dump_json())
    with pytest.raises(InvalidArtifact):
        Token.from_bytes(make_file(manifest={**manifest, **change}))


def test_no_manifest():
    with pytest.raises(InvalidArtifact, match="Not a token file"):
        Token.from_bytes(make_file(metadata={"format": "pt"}))


def test_altered_tensor():
    at = len(GOOD) - 2
    with pytest.raises(InvalidArtifact, match="changed or damaged"):
        Token.from_bytes(GOOD[:at] + bytes([GOOD[at] ^ 1]) + GOOD[at + 1 :])


def test_template_digest_must_be_the_fingerprints():
    manifest = json.loads(make_manifest(tensor_sha256=tensor_sha256(VECTORS)).model_dump_json())
    with pytest.raises(InvalidArtifact, match="template_digest"):
        Token.from_bytes(make_file(manifest={**manifest, "template_digest": "f" * 16}))


def test_wrong_model_names_both_fingerprints():
    token = Token.from_bytes(GOOD)
    token.check_model(MADE_FOR, 8, served="tiny")
    with pytest.raises(WrongModel) as caught:
        token.check_model(OTHER, 8, served="another")
    assert str(MADE_FOR) in caught.value.message
    assert str(OTHER) in caught.value.message
    assert "embedding" in caught.value.message
    with pytest.raises(WrongModel, match="hidden_size 8 != 16"):
        token.check_model(MADE_FOR, 16, served="tiny")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_any_flipped_bytes_give_a_token_or_a_refusal(flips):
    data = bytearray(GOOD)
    for at, bits in flips:
        data[at] ^= bits
    try:
        token = Token.from_bytes(bytes(data))
    except BEError:
        return
    # What is accepted has an intact tensor: flips that survive are in the manifest's free text.
    assert np.array_equal(token.vectors, VECTORS)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_a_refusal(data):
    with pytest.raises(BEError):
        Token.from_bytes(data)


def test_a_manifest_tells_no_folders(tmp_path, monkeypatch):
    """Its file goes to other people: a path says who trained it, and where."""
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    named = {
        "org/model": "org/model",
        "builtin:smollm2-135m-instruct": "builtin:smollm2-135m-instruct",
        "/home/anna/secret-project/qwen.gguf": "qwen.gguf",
        "~/models/qwen/": "qwen",
        "../models/qwen": "qwen",
        "llama": "llama",
        str(tmp_path / "llama"): "llama",
        "/hub/models--org--model/snapshots/0a1b2c": "org/model",
    }
    assert {name: BaseModelRef.of(name, None, MADE_FOR).name for name in named} == named
