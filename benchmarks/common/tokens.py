"""Make a token for measurements, without training and without torch.

The cost of a request with a token depends on the number of vectors, not on their values. The
token holds k rows of the model's input embedding: the rows of the plain k-token prompt that the
benchmark compares it with. Both must give the same answers. Equal answers also prove that the
vectors reached the model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.errors import InputError
from be_serve.core.fingerprint import chat_template_text, fingerprint_folder
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import pinned_template_kwargs

BENCH_ID = "bench-ttft"
_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}


def make_token(folder: Path, model: str, revision: str | None, ids: Sequence[int], prompt: str) -> Token:
    """Return a token that replaces `prompt`; its vectors are the embedding rows of `ids`.

    Raises InputError if the folder's embedding cannot be read.
    """
    fingerprint = fingerprint_folder(folder)
    vectors = embedding_rows(folder, ids)
    manifest = Manifest(
        id=BENCH_ID,
        base_model=BaseModelRef(name=model, revision=revision, fingerprint=fingerprint),
        hidden_size=vectors.shape[1],
        k=vectors.shape[0],
        template_digest=fingerprint.chat_template,
        template_kwargs=pinned_template_kwargs(chat_template_text(folder)),
        prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=len(ids), text=prompt),
        recipe={"name": "bench", "note": "rows of the input embedding, untrained: for timing only"},
    )
    return Token(manifest, vectors)


def embedding_rows(folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return rows `ids` of the model's input embedding, [len(ids), hidden_size] float32.

    The function reads these rows only. Raises InputError if the embedding is missing or
    quantised, or if an id is not below its number of rows.
    """
    for file in _candidates(folder):
        header, base = _header(file)
        entries = [header[name] for name in sorted(header) if name.endswith(_NAMES)]
        if not entries:
            continue
        # A multimodal checkpoint has several embeddings. The language model's is the largest.
        entry = max(entries, key=lambda e: int(np.prod(e["shape"])))
        rows, width = (int(n) for n in entry["shape"])
        size = _WIDTHS.get(entry["dtype"])
        if size is None:
            raise InputError(f"The input embedding in {file} has dtype {entry['dtype']}. Give a token with --token.")
        if max(ids) >= rows:
            raise InputError(f"Token id {max(ids)} is outside the {rows} rows of the embedding in {file}.")
        with file.open("rb") as handle:
            chunks = []
            for i in ids:
                handle.seek(base + int(entry["data_offsets"][0]) + i * width * size)
                chunks.append(handle.read(width * size))
        return _to_float32(b"".join(chunks), entry["dtype"]).reshape(len(ids), width)
    raise InputError(f"{folder} holds no input embedding in safetensors form. Give a token with --token.")


def _candidates(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return sorted({folder / file for name, file in weight_map.items() if name.endswith(_NAMES)})


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return a safetensors file's header and the byte offset of its data."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length)), 8 + length


def _to_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Return little-endian BF16, F16 or F32 bytes as float32. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype="<f2" if dtype == "F16" else "<f4").astype(np.float32)
