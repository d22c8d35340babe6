"""The tokens of one server process: its model, registry and index, and the operations of the admin routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from be_serve.core.artifact import MAX_BYTES, Manifest, Token, check_vectors, read_limited
from be_serve.core.errors import TooManyVectors, WrongModel
from be_serve.core.fingerprint import Fingerprint
from be_serve.core.prompts import prompt_sha256
from be_serve.registry import PutResult, Record, Registry, TokenIndex
from be_serve.serving.injection.row_pool import too_many_vectors
from be_serve.serving.metrics import Metrics
from be_serve.serving.settings import Settings


@dataclass(frozen=True)
class ServedModel:
    """The properties of the served model that a token must match."""

    name: str
    fingerprint: Fingerprint
    hidden_size: int
    vocab_size: int
    dtype: str
    """Serving dtype by its torch name: bfloat16, float16 or float32."""


class Service:
    """Registers, looks up and removes tokens for one served model."""

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        metrics: Metrics,
        *,
        prepare: Any,
        vllm_has_api_key: bool,
        capacity: int | None = None,
    ) -> None:
        """`capacity` is the largest number of vectors that a token may have on this server; None: no limit."""
        self.settings = settings
        self.model = model
        self.metrics = metrics
        self.vllm_has_api_key = vllm_has_api_key
        self.capacity = capacity
        self._listed: tuple[int, list[Record]] | None = None
        self.registry = Registry(settings.registry)
        self.index: TokenIndex[Any] = TokenIndex(
            self.registry,
            prepare=prepare,
            check=self.check,
            check_record=self.check_record,
            cache_bytes=settings.cache_bytes,
            on_refresh=self._refreshed,
        )

    def start(self) -> None:
        """Load the `--be-token` files and the registry. Raises BEError for any fault, so that the server stops."""
        prompt_sha256("\u00e9")  # builds its regular expression now: that takes 0.2 s, and no request should wait
        for be_id, path in self.settings.tokens.items():
            self.index.add_static(be_id, read_limited(path))
        self.index.start()

    def _refreshed(self, tokens: int) -> None:
        self.metrics.refreshed.set_to_current_time()
        self.metrics.tokens.set(tokens)

    def check(self, token: Token) -> None:
        """Raise WrongModel, InvalidArtifact or TooManyVectors for a token this server must not serve."""
        self._check_manifest(token.manifest)
        check_vectors(token.vectors, dtype=self.model.dtype)

    def check_record(self, record: Record) -> None:
        """As `check`, by the manifest alone: raises WrongModel or TooManyVectors."""
        self._check_manifest(record.manifest)

    def _check_manifest(self, manifest: Manifest) -> None:
        manifest.check_model(self.model.fingerprint, self.model.hidden_size, served=self.model.name)
        if self.capacity is not None and manifest.k > self.capacity:
            raise too_many_vectors(manifest.k, self.capacity)

    def usable(self, record: Record) -> bool:
        """Whether a record was made for this server's model and its vectors fit the rows."""
        try:
            self.check_record(record)
        except (WrongModel, TooManyVectors):
            return False
        return True

    def listed(self) -> list[Record]:
        """The records whose aliases /v1/models lists. Returns the same list object until the registry changes."""
        revision = self.index.revision
        if self._listed is None or self._listed[0] != revision:
            self._listed = revision, [record for record in self.index.records() if self.usable(record)]
        return self._listed[1]

    def register(self, data: bytes, *, be_id: str | None, match: bool | None, replace: bool) -> PutResult:
        """Check a token file against the model, store it and have its vectors ready. Blocks; raises BEError.

        Here the file is parsed for the only time in this process.
        """
        # The registry's own limit holds, too: other processes read the file back under it.
        token = Token.from_bytes(data, max_bytes=min(self.settings.max_upload, MAX_BYTES))
        self.check(token)
        self.index.refuse_static(be_id if be_id is not None else token.manifest.id)
        result = self.registry.put(data, be_id=be_id, match=match, replace=replace, token=token)
        self.index.keep(result.record, token, len(data))
        self.index.refresh()
        return result

    def store_prompt(self, be_id: str, text: str) -> Record:
        """Store the text of a token's prompt. Blocks; raises TokenNotFound, TokenConflict, InvalidArtifact."""
        self.index.refuse_static(be_id)
        self.registry.store_prompt(be_id, text)
        self.index.refresh()
        return self.index.get(be_id)

    def remove(self, be_id: str, *, prompt: bool = False) -> bool:
        """Remove a token, and its stored prompt if `prompt`. Returns whether a stored prompt is kept.

        Blocks; raises TokenNotFound, TokenConflict.
        """
        self.index.refuse_static(be_id)
        self.registry.remove(be_id, prompt=prompt)
        self.index.refresh()
        return self.index.has_prompt(be_id)
