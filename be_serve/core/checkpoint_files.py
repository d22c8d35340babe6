"""The input embedding of a checkpoint folder, read from its safetensors files; no model is loaded.

A safetensors file is eight bytes with the header's length, the header as JSON, then the
tensors. Only the header and the rows asked for are read, and no length is trusted before
it is held against the file's size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from be_serve.core.errors import InputError

_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_LENGTH_BYTES = 8
_MAX_HEADER = 100 * 1024 * 1024
"""Safetensors' own limit."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of at least one row lies: `size` bytes from `start` on in `file`."""

    file: Path
    name: str
    dtype: str
    """As safetensors writes it: BF16, F16, F32, ..."""
    shape: tuple[int, ...]
    start: int
    size: int

    def row_bytes(self, rows: Iterable[int]) -> list[bytes]:
        """The bytes of rows along the first axis, in the order given. Raises InputError where it cannot be read."""
        width = self.size // self.shape[0]
        chunks = []
        try:
            with self.file.open("rb") as handle:
                for row in rows:
                    handle.seek(self.start + row * width)
                    chunks.append(handle.read(width))
        except OSError as exc:
            raise InputError(f"Cannot read {self.file}: {exc.strerror}.") from exc
        return chunks


def find_embedding(folder: Path) -> StoredTensor | None:
    """The input embedding of a checkpoint folder; None where no safetensors file holds one.

    A multimodal checkpoint has several; the language model's is the largest. Raises
    InputError for a file or an index that is damaged or missing.
    """
    for file in _files(folder):
        found = _embeddings(file)
        if found:
            return max(found, key=lambda tensor: tensor.size)
    return None


def _files(folder: Path) -> list[Path]:
    """The files in which an input embedding may lie, by the folder's index where it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"Cannot read {index}: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(index, "it is no JSON") from exc
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise _damaged(index, "it has no `weight_map` from tensors to files")
    return sorted({folder / file for name, file in weight_map.items() if name.endswith(_EMBEDDING_NAMES)})


def _embeddings(file: Path) -> list[StoredTensor]:
    """The input embeddings in a file, by name."""
    header, base, size = _header(file)
    return [_tensor(file, name, header[name], base, size) for name in sorted(header) if name.endswith(_EMBEDDING_NAMES)]


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, the offset at which its tensors begin, and the file's size."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            base = _LENGTH_BYTES + length
            if size < _LENGTH_BYTES or length > _MAX_HEADER or base > size:
                raise _damaged(file, f"{size} bytes cannot hold its header")
            header = json.loads(handle.read(length))
    except OSError as exc:
        raise InputError(f"Cannot read {file}: {exc.strerror}.") from exc
    except (ValueError, RecursionError) as exc:
        raise _damaged(file, "its header is no JSON") from exc
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    return header, base, size


def _tensor(file: Path, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    """A header's entry, held against the file's size."""
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(file, f"its header does not say where {name} lies")
    start, end = offsets
    if not start <= end <= size - base:
        raise _damaged(file, f"{name} reaches outside the file, which was perhaps not copied whole")
    if not shape or not shape[0]:
        raise _damaged(file, f"{name} has the shape {shape}, which has no rows")
    return StoredTensor(file, name, dtype, tuple(shape), base + start, end - start)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether a value of the header is a list of whole numbers from 0 on."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _damaged(file: Path, why: str) -> InputError:
    return InputError(f"{file} is damaged: {why}. Download or convert the checkpoint again.")
