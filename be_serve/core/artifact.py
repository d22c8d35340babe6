"""Reads, checks and writes the token file: one `.safetensors` with the vectors and a JSON manifest.

    tensor    prompt_embeddings   [k, hidden_size] float32   (PEFT's prompt-tuning key)
    metadata  be_manifest         JSON, see `Manifest`

Reading a file executes nothing in it, and uses no length from it without a check.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from be_serve.core.errors import ArtifactTooLarge, BEError, InputError, InvalidArtifact, WrongModel
from be_serve.core.fingerprint import Fingerprint
from be_serve.core.ids import validate_be_id
from be_serve.core.prompts import prompt_sha256

TENSOR_NAME = "prompt_embeddings"
MANIFEST_KEY = "be_manifest"
FORMAT_VERSION: Literal[1] = 1
MAX_BYTES = 64 * 1024 * 1024
_MAX_HEADER_BYTES = 1024 * 1024
_NO_SAFETENSORS = (
    "This is not a .safetensors file. Give the token file that `be-serve train` wrote; the body of an upload is that "
    "file's bytes and nothing else (curl --data-binary @FILE)."
)

Placement = Literal["system", "block", "prefix"]
TEMPLATE_VARIABLES = frozenset({"date_string"})
Vectors = NDArray[np.float32]

# Largest finite value of each dtype that a server can serve in.
_DTYPE_MAX = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}


def told_name(name: str) -> str:
    """What a file that travels says of a model: of a path its last part, of a hub's snapshot the repository.

    The folders above are nobody's business.
    """
    path = Path(name)
    if not (path.is_absolute() or name.startswith(("~", ".")) or path.exists()):
        return name
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.resolve().name or name


class BaseModelRef(BaseModel):
    """The frozen model that a token was trained for."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=512)
    revision: str | None = Field(default=None, max_length=128)
    fingerprint: Fingerprint

    @classmethod
    def of(cls, name: str, revision: str | None, fingerprint: Fingerprint) -> BaseModelRef:
        """The model of this name or path, told as `told_name` tells it."""
        return cls(name=told_name(name), revision=revision, fingerprint=fingerprint)

    @field_validator("name", "revision")
    @classmethod
    def _printable(cls, text: str | None) -> str | None:
        """Refuses control characters, because terminals and logs show these texts."""
        if text is not None and not text.isprintable():
            raise ValueError("holds characters that cannot be printed")
        return text


class PromptRef(BaseModel):
    """The system prompt that a token replaces. `text` is set only if the maker chose to include it."""

    model_config = ConfigDict(extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tokens: int = Field(ge=1)
    text: str | None = None

    @model_validator(mode="after")
    def _text_is_the_prompt(self) -> PromptRef:
        if self.text is not None and prompt_sha256(self.text) != self.sha256:
            raise ValueError("the prompt's text does not have the prompt's sha256")
        return self


class Manifest(BaseModel):
    """Header of a token file, format version 1."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    id: str
    base_model: BaseModelRef
    hidden_size: int = Field(ge=1, le=1_000_000)
    k: int = Field(ge=1, le=1_000_000)
    literal: int = Field(default=0, ge=0)
    """Number of vectors that are embeddings of words, or were trained on from them. They come first.

    Whoever has the file and the model can read the words: training moves a vector, and its nearest embedding stays
    the word that it began as.
    """
    placement: Placement = "system"
    template_digest: str
    """Digest of the chat template; equals `fingerprint.chat_template`."""
    template_kwargs: dict[str, Annotated[str, Field(max_length=64)]] = Field(default_factory=dict)
    """Template variables that training pinned. The server uses the same values.

    Only TEMPLATE_VARIABLES are allowed. With other variables a manifest could choose the server's
    chat template, and a chat template is a program.
    """
    prompt: PromptRef
    recipe: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    quality: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    tensor_sha256: str = ""

    @field_validator("template_kwargs")
    @classmethod
    def _known_variables(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := set(value) - TEMPLATE_VARIABLES:
            raise ValueError(f"only {sorted(TEMPLATE_VARIABLES)} can be pinned, not {sorted(unknown)}")
        return value

    @model_validator(mode="after")
    def _literal_are_vectors(self) -> Manifest:
        if self.literal > self.k:
            raise ValueError(f"literal {self.literal} is larger than k {self.k}")
        return self

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        try:
            return validate_be_id(value, param="id")
        except BEError as exc:
            raise ValueError(exc.message) from exc

    def check_model(self, fingerprint: Fingerprint, hidden_size: int, *, served: str) -> None:
        """Raise WrongModel, with both fingerprints, unless the token was trained for this model.

        `served` is the model's name, for the message.
        """
        differing = self.base_model.fingerprint.differing(fingerprint)
        if self.hidden_size != hidden_size:
            differing.append(f"hidden_size {self.hidden_size} != {hidden_size}")
        if differing:
            raise WrongModel(
                f"Token {self.id!r} was made for {self.base_model.name} (fingerprint "
                f"{self.base_model.fingerprint}), but this model is {served} (fingerprint {fingerprint}); they differ "
                f"in: {', '.join(differing)}. Train the token on the model that you serve."
            )


def tensor_sha256(vectors: Vectors) -> str:
    """SHA-256 (hex) of the vectors as little-endian float32, row by row."""
    return hashlib.sha256(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).hexdigest()


def check_vectors(vectors: NDArray[Any], *, dtype: str = "float32") -> None:
    """Check that `vectors` is a float32 array [k, hidden_size], finite before and after a cast to `dtype`.

    Raises InvalidArtifact, which names the first fault.
    """
    if vectors.ndim != 2 or vectors.shape[0] < 1 or vectors.shape[1] < 1:
        raise InvalidArtifact(f"{TENSOR_NAME} must have shape [k, hidden_size], not {list(vectors.shape)}.")
    if vectors.dtype != np.float32:
        raise InvalidArtifact(f"{TENSOR_NAME} must be float32, not {vectors.dtype}.")
    if not np.isfinite(vectors).all():
        raise InvalidArtifact(f"{TENSOR_NAME} contains NaN or Inf: the training run diverged. Train the token again.")
    if dtype not in _DTYPE_MAX:
        raise InvalidArtifact(f"Serving dtype {dtype!r} is not supported; use one of {sorted(_DTYPE_MAX)}.")
    largest = float(np.abs(vectors).max())
    if largest > _DTYPE_MAX[dtype]:
        raise InvalidArtifact(
            f"{TENSOR_NAME} holds {largest:.4g}, which becomes Inf in the serving dtype {dtype}. "
            "Serve with --dtype bfloat16 or float32, or train the token again."
        )


@dataclass(frozen=True)
class Token:
    """A token in memory: manifest and vectors [k, hidden_size] float32.

    token = Token.load("captain.safetensors")
    token.manifest.id, token.vectors.shape
    """

    manifest: Manifest
    vectors: Vectors

    def to_bytes(self) -> bytes:
        """The bytes of the token file, with `tensor_sha256` in the manifest. Raises InvalidArtifact."""
        check_vectors(self.vectors)
        if self.vectors.shape != (self.manifest.k, self.manifest.hidden_size):
            raise InvalidArtifact(
                f"Manifest says [{self.manifest.k}, {self.manifest.hidden_size}], "
                f"vectors have {list(self.vectors.shape)}."
            )
        manifest = self.manifest.model_copy(update={"tensor_sha256": tensor_sha256(self.vectors)})
        return save_safetensors(
            {TENSOR_NAME: np.ascontiguousarray(self.vectors)},
            # One key only: safetensors writes several keys in random order, which would change the file's digest.
            metadata={MANIFEST_KEY: manifest.model_dump_json()},
        )

    def save(self, path: str | Path) -> str:
        """Write the file atomically. Returns its digest. Raises InputError if it cannot be written."""
        data = self.to_bytes()
        write_atomically(Path(path), data)
        return file_digest(data)

    @classmethod
    def from_bytes(cls, data: bytes, *, max_bytes: int = MAX_BYTES) -> Token:
        """Parse and check a token file.

        Raises ArtifactTooLarge above `max_bytes`. Raises InvalidArtifact unless the bytes are
        a complete, undamaged token file of this format version.
        """
        if len(data) > max_bytes:
            raise ArtifactTooLarge(f"The token file has {len(data)} bytes; at most {max_bytes} are accepted.")
        manifest = parse_manifest(_header(data[: 8 + _MAX_HEADER_BYTES], len(data)))
        try:
            tensors = load_safetensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as exc:
            raise InvalidArtifact(f"Damaged safetensors file: {exc}.") from exc
        if set(tensors) != {TENSOR_NAME}:
            raise InvalidArtifact(f"A token file holds exactly one tensor, {TENSOR_NAME}; found {sorted(tensors)}.")
        vectors = tensors[TENSOR_NAME]
        check_vectors(vectors)
        if vectors.shape != (manifest.k, manifest.hidden_size):
            raise InvalidArtifact(
                f"Manifest says [{manifest.k}, {manifest.hidden_size}], the tensor has {list(vectors.shape)}."
            )
        if tensor_sha256(vectors) != manifest.tensor_sha256:
            raise InvalidArtifact(
                "The tensor does not match the manifest's digest: the file was changed or damaged. Copy it again."
            )
        return cls(manifest, vectors)

    @classmethod
    def load(cls, path: str | Path, *, max_bytes: int = MAX_BYTES) -> Token:
        """Read and check a token file from disk. Raises as `from_bytes`, and InputError if it cannot be read."""
        return cls.from_bytes(read_limited(path, max_bytes), max_bytes=max_bytes)

    def check_model(self, fingerprint: Fingerprint, hidden_size: int, *, served: str) -> None:
        """As `Manifest.check_model`."""
        self.manifest.check_model(fingerprint, hidden_size, served=served)


def file_digest(data: bytes) -> str:
    """Digest of a token file: SHA-256 (hex) of its bytes, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def read_limited(path: str | Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises InputError, ArtifactTooLarge."""
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError(f"No token file at {path}.")
        if (size := path.stat().st_size) > max_bytes:
            raise ArtifactTooLarge(f"{path} has {size} bytes; at most {max_bytes} are accepted.")
        return path.read_bytes()
    except OSError as exc:
        raise InputError(f"Cannot read {path}: {exc.strerror}.") from exc


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a token file. Does not read or check the tensor. Raises InputError, InvalidArtifact."""
    path = Path(path)
    try:
        with path.open("rb") as handle:
            head = handle.read(8 + _MAX_HEADER_BYTES)
        size = path.stat().st_size
    except OSError as exc:
        raise InputError(f"Cannot read {path}: {exc.strerror}.") from exc
    return parse_manifest(_header(head, size))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new file, and never a part. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as exc:
        raise InputError(f"Cannot write {path}: {exc.strerror}.") from exc


def _umask() -> int:
    """The process's umask. Sets it for a moment, because there is no other way to read it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _header(head: bytes, size: int) -> dict[str, Any]:
    """The safetensors header as a JSON object. `head` has the file's first bytes; `size` is the file's length.

    Raises InvalidArtifact.
    """
    if len(head) < 8:
        raise InvalidArtifact(_NO_SAFETENSORS)
    (length,) = struct.unpack("<Q", head[:8])
    if length > _MAX_HEADER_BYTES and 8 + length > size:  # text, an archive, a form: these bytes are no length
        raise InvalidArtifact(_NO_SAFETENSORS)
    if length > _MAX_HEADER_BYTES:
        raise InvalidArtifact("Not a token file: the safetensors header is larger than 1 MiB.")
    if 8 + length > size or 8 + length > len(head):
        raise InvalidArtifact("Truncated token file: it ends inside its header. Copy it again.")
    try:
        header = json.loads(head[8 : 8 + length])
    except (ValueError, RecursionError) as exc:
        raise InvalidArtifact("Not a safetensors file: its header is no JSON.") from exc
    if not isinstance(header, dict):
        raise InvalidArtifact("Not a safetensors file: its header is no JSON object.")
    offsets = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    ends = [o[1] for o in offsets if isinstance(o, list) and len(o) == 2 and isinstance(o[1], int)]
    if ends and 8 + length + max(ends) > size:
        raise InvalidArtifact("Truncated token file: it ends inside its tensor. Copy it again.")
    return header


def parse_manifest(header: dict[str, Any]) -> Manifest:
    """Validate the manifest in a safetensors header. Raises InvalidArtifact."""
    metadata = header.get("__metadata__")
    raw = metadata.get(MANIFEST_KEY) if isinstance(metadata, dict) else None
    if not isinstance(raw, str):
        raise InvalidArtifact(
            f"Not a token file: the header has no `{MANIFEST_KEY}`. "
            "A PEFT prompt-tuning file can be converted with Token(manifest, vectors).save()."
        )
    try:
        data = json.loads(raw)
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise InvalidArtifact(
                f"The token file has format version {version!r}; this be-serve reads version {FORMAT_VERSION}. "
                "Upgrade be-serve, or write the file with a matching version."
            )
        manifest = Manifest.model_validate(data)
        # The registry stores the manifest as JSON. This refuses values that JSON cannot store and read back, such as
        # lone surrogates and deep nesting.
        manifest = Manifest.model_validate_json(manifest.model_dump_json())
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise InvalidArtifact(f"Invalid manifest: {where}: {first['msg']}.") from exc
    except (ValueError, RecursionError) as exc:  # PydanticSerializationError is a ValueError
        raise InvalidArtifact("Invalid manifest: it is not a plain JSON object.") from exc
    if manifest.template_digest != manifest.base_model.fingerprint.chat_template:
        raise InvalidArtifact("Invalid manifest: template_digest differs from the fingerprint's chat_template.")
    return manifest
