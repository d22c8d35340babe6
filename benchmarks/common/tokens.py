"""Make a token for measurements, without training and without torch.

The cost of a request with a token depends on the number of vectors, not on their values. The
token holds k rows of the model's input embedding: the rows of the plain k-token prompt that the
benchmark compares it with. Both must give the same answers. Equal answers also prove that the
vectors reached the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.checkpoint_files import find_embedding
from be_serve.core.errors import InputError
from be_serve.core.fingerprint import chat_template_text, fingerprint_folder
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import pinned_template_kwargs
from benchmarks.common.client import ServerClient

BENCH_ID = "bench-ttft"
_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}


def make_token(folder: Path, model: str, revision: str | None, ids: Sequence[int], prompt: str) -> Token:
    """Return a token that replaces `prompt`; its vectors are the embedding rows of `ids`.

    Raises InputError if the folder's embedding cannot be read.
    """
    fingerprint = fingerprint_folder(folder)
    vectors = embedding_rows(folder, ids)
    manifest = Manifest(
        id=BENCH_ID,
        base_model=BaseModelRef.of(model, revision, fingerprint),
        hidden_size=vectors.shape[1],
        k=vectors.shape[0],
        template_digest=fingerprint.chat_template,
        template_kwargs=pinned_template_kwargs(chat_template_text(folder)),
        prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=len(ids), text=prompt),
        recipe={"name": "bench", "note": "rows of the input embedding, untrained: for timing only"},
    )
    return Token(manifest, vectors)


async def register(client: ServerClient, be_id: str, token: Token, admin_key: str) -> None:
    """Register a token on a server under an id; replace what the server has under that id. Raises ServerError."""
    data = Token(token.manifest.model_copy(update={"id": be_id}), token.vectors).to_bytes()
    # The registry of an earlier run in the same folder can already have the id.
    headers, params = {"X-BE-Key": admin_key}, {"id": be_id, "replace": "true"}
    await client.call("POST", "/v1/be/tokens", params=params, content=data, headers=headers)


def embedding_rows(folder: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Return rows `ids` of the model's input embedding, [len(ids), hidden_size] float32.

    The function reads these rows only. Raises InputError if the embedding is missing or
    quantised, or if an id is not below its number of rows.
    """
    embedding = find_embedding(folder)
    if embedding is None:
        raise InputError(f"{folder} holds no input embedding in safetensors form. Give a token with --token.")
    file, shape, size = embedding.file, embedding.shape, _WIDTHS.get(embedding.dtype)
    if size is None:
        raise InputError(f"The input embedding in {file} has dtype {embedding.dtype}. Give a token with --token.")
    if len(shape) != 2 or embedding.size != shape[0] * shape[1] * size:
        raise InputError(f"The input embedding in {file} is not a plain matrix. Give a token with --token.")
    if max(ids) >= shape[0]:
        raise InputError(f"Token id {max(ids)} is outside the {shape[0]} rows of the embedding in {file}.")
    return _to_float32(b"".join(embedding.row_bytes(ids)), embedding.dtype).reshape(len(ids), shape[1])


def _to_float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    """Return little-endian BF16, F16 or F32 bytes as float32. A bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype="<f2" if dtype == "F16" else "<f4").astype(np.float32)
