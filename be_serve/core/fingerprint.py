"""Computes the fingerprint of a model: four digests of its checkpoint folder.

A vector works in one embedding space only. So trainer and server both hash what
defines that space: the configuration, the tokenizer, the chat template and the
input embedding. All of it is read from files; no model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from be_serve.core.checkpoint_files import find_embedding
from be_serve.core.errors import InputError

# Keys that describe how a checkpoint was written or should run. They do not change what it computes.
_VOLATILE_CONFIG = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
_SAMPLED_ROWS = 256


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Fingerprint(BaseModel):
    """Short SHA-256 digests (16 hex digits) of the parts of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Digest
    tokenizer: Digest
    chat_template: Digest
    embedding: Digest

    def __str__(self) -> str:
        return "-".join((self.config, self.tokenizer, self.chat_template, self.embedding))

    def differing(self, other: Fingerprint) -> list[str]:
        """Names of the parts in which two fingerprints differ."""
        return [name for name in Fingerprint.model_fields if getattr(self, name) != getattr(other, name)]


def _digest(*chunks: bytes) -> str:
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(len(chunk).to_bytes(8, "little"))
        sha.update(chunk)
    return sha.hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} is no model folder: it has no {path.name}. Name another folder.") from None
    except (OSError, ValueError) as exc:
        raise InputError(f"Cannot read {path}: {exc}.") from exc


def template_digest(template: str | None) -> str:
    """Digest of a chat template's text. Ignores the kind of line ends, and white space at both ends."""
    return _digest((template or "").replace("\r\n", "\n").strip().encode())


def chat_template_text(folder: Path) -> str | None:
    """The folder's default chat template, or None if it has none."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    template = _read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):  # several named templates; "default" is the one for chats
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _tokenizer_digest(folder: Path) -> str:
    fast = folder / "tokenizer.json"
    if fast.exists():
        spec = _read_json(fast)
        # Truncation and padding are settings of the program that saved the file, not of the tokenizer.
        spec.pop("truncation", None)
        spec.pop("padding", None)
        return _digest(_canonical(spec))
    found = [p for n in ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt") if (p := folder / n).exists()]
    if not found:
        raise InputError(f"{folder} holds no tokenizer. Add tokenizer.json, tokenizer.model or tekken.json to it.")
    return _digest(*(p.read_bytes() for p in found))


def _embedding_digest(folder: Path) -> str:
    """Digest of the embedding's dtype, shape and 256 evenly spaced rows. All rows of a large model take minutes."""
    embedding = find_embedding(folder)
    if embedding is None:
        raise InputError(
            f"{folder} holds no input embedding in safetensors form. Convert the checkpoint "
            "(save_pretrained writes safetensors): be-serve never opens pickled weights."
        )
    rows = embedding.shape[0]
    sampled = min(rows, _SAMPLED_ROWS)
    chunks = embedding.row_bytes(i * rows // sampled for i in range(sampled))
    return _digest(_canonical([embedding.dtype, embedding.shape]), *chunks)


def fingerprint_folder(folder: str | Path, *, chat_template: str | None = None) -> Fingerprint:
    """Fingerprint of a Hugging Face model folder.

    `chat_template` replaces the folder's own, as vLLM's `--chat-template` does.
    Raises InputError if the folder is incomplete.
    """
    folder = Path(folder)
    config = {k: v for k, v in _read_json(folder / "config.json").items() if k not in _VOLATILE_CONFIG}
    template = chat_template if chat_template is not None else chat_template_text(folder)
    return Fingerprint(
        config=_digest(_canonical(config)),
        tokenizer=_tokenizer_digest(folder),
        chat_template=template_digest(template),
        embedding=_embedding_digest(folder),
    )
