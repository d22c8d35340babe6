"""Damaged checkpoint files: each is refused in words, by whoever reads one."""

from __future__ import annotations

import json

import pytest

from be_serve.core.checkpoint_files import find_embedding
from be_serve.core.errors import InputError
from be_serve.core.fingerprint import fingerprint_folder
from benchmarks.common.tokens import embedding_rows

NAME = "model.embed_tokens.weight"
DATA = bytes(range(32))
ENTRY = {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}


def file_of(header: object, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = file_of({"__metadata__": {"format": "pt"}, NAME: ENTRY})
DAMAGED = {
    "empty": (b"", "cannot hold its header"),
    "shorter than the length": (GOOD[:5], "cannot hold its header"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "cannot hold its header"),
    "huge header": ((1 << 60).to_bytes(8, "little") + GOOD[8:], "cannot hold its header"),
    "cut in the header": (GOOD[:40], "cannot hold its header"),
    "no JSON": (file_of(b"{" * 40), "header is no JSON"),
    "deep JSON": (file_of(b"[" * 100_000), "header is no JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "header is no JSON"),
    "no object": (file_of([NAME]), "no JSON object"),
    "entry is a list": (file_of({NAME: []}), "does not say where"),
    "no dtype": (file_of({NAME: {**ENTRY, "dtype": None}}), "does not say where"),
    "no shape": (file_of({NAME: {**ENTRY, "shape": "4x2"}}), "does not say where"),
    "no offsets": (file_of({NAME: {"dtype": "F32", "shape": [4, 2]}}), "does not say where"),
    "one offset": (file_of({NAME: {**ENTRY, "data_offsets": [0]}}), "does not say where"),
    "negative offset": (file_of({NAME: {**ENTRY, "data_offsets": [-8, 24]}}), "does not say where"),
    "offsets are no integers": (file_of({NAME: {**ENTRY, "data_offsets": [0.0, 32.0]}}), "does not say where"),
    "offsets turned around": (file_of({NAME: {**ENTRY, "data_offsets": [32, 0]}}), "outside the file"),
    "cut in the tensor": (GOOD[:-1], "outside the file"),
    "no rows": (file_of({NAME: {**ENTRY, "shape": [0, 2], "data_offsets": [0, 0]}}), "no rows"),
    "a scalar": (file_of({NAME: {**ENTRY, "shape": [], "data_offsets": [0, 4]}}), "no rows"),
}


@pytest.fixture
def folder(tmp_path):
    """All that a fingerprint reads, but for the weights."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_every_reader(folder, name):
    data, why = DAMAGED[name]
    (folder / "model.safetensors").write_bytes(data)
    for read in (find_embedding, fingerprint_folder, lambda folder: embedding_rows(folder, [1])):
        with pytest.raises(InputError, match=rf"model\.safetensors is damaged: .*{why}"):
            read(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is damaged: it is no JSON"),
        ("[]", "is damaged: it has no `weight_map`"),
        ("{}", "is damaged: it has no `weight_map`"),
        (json.dumps({"weight_map": [NAME]}), "is damaged: it has no `weight_map`"),
        (json.dumps({"weight_map": {NAME: 1}}), "is damaged: it has no `weight_map`"),
        (json.dumps({"weight_map": {NAME: "model-00001-of-00001.safetensors"}}), "No such file"),
    ],
)
def test_a_damaged_index_is_refused_by_every_reader(folder, text, why):
    (folder / "model.safetensors.index.json").write_text(text)
    for read in (find_embedding, fingerprint_folder, lambda folder: embedding_rows(folder, [1])):
        with pytest.raises(InputError, match=why):
            read(folder)


def test_where_an_embedding_lies(folder):
    assert find_embedding(folder) is None
    small = {**ENTRY, "shape": [1, 2], "data_offsets": [32, 40]}
    header = {"a.embed_tokens.weight": small, NAME: ENTRY, "lm_head.weight": "not looked at"}
    (folder / "model.safetensors").write_bytes(file_of(header, DATA + bytes(8)))
    found = find_embedding(folder)
    assert found is not None
    assert (found.name, found.dtype, found.shape, found.size) == (NAME, "F32", (4, 2), 32)
    assert found.row_bytes([3, 0]) == [DATA[24:], DATA[:8]]


def test_a_matrix_whose_size_is_not_its_shapes(folder):
    (folder / "model.safetensors").write_bytes(file_of({NAME: {**ENTRY, "shape": [4, 3]}}))
    with pytest.raises(InputError, match="not a plain matrix"):
        embedding_rows(folder, [1])
