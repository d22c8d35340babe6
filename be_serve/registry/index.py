"""The server's in-memory copy of the registry.

A request finds its token without a database query: a thread polls the registry's revision
and reads only the changes. A cache with a limit in bytes holds the vectors: from registration on in the
process that took the upload, from first use on in all others.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from be_serve.core.artifact import Token, file_digest
from be_serve.core.errors import TokenConflict, TokenNotFound
from be_serve.core.prompts import prompt_sha256
from be_serve.core.redaction import hide
from be_serve.registry.store import Record, Registry

logger = logging.getLogger("vllm.be_serve.registry")
V = TypeVar("V")
_TEXT_BYTES = 16 * 1024 * 1024
_MAX_SKIPS = 20
"""How many polls in a row may skip reading the registry because its mark did not change."""


class ByteLRU(Generic[V]):
    """A least-recently-used cache. The sum of its values' sizes is at most `capacity` bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._lock = threading.Lock()
        self._items: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def get(self, key: str) -> V | None:
        """The value, which becomes the most recently used; None if it is not in the cache."""
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[0]

    def put(self, key: str, value: V, size: int) -> None:
        """Add a value of `size` bytes. A value larger than the capacity is not added."""
        with self._lock:
            if key in self._items:
                self.used -= self._items.pop(key)[1]
            if size > self.capacity:
                return
            self._items[key] = (value, size)
            self.used += size
            while self.used > self.capacity:
                _, (_, freed) = self._items.popitem(last=False)
                self.used -= freed


class TokenIndex(Generic[V]):
    """Finds tokens by id and by prompt digest.

    `prepare` converts a checked Token to the form that the server injects (a tensor in the serving dtype); the
    result is cached. `check` raises an error for a token that this server must not serve. Such a token is
    listed, and refused when it is used. `check_record` checks the manifest alone, before vectors are read.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        prepare: Callable[[Token], V],
        check: Callable[[Token], None],
        check_record: Callable[[Record], None] = lambda record: None,
        cache_bytes: int = 256 * 1024 * 1024,
        poll_seconds: float = 0.5,
        on_refresh: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self._registry = registry
        self._prepare = prepare
        self._check = check
        self.check_record = check_record
        self._cache: ByteLRU[V] = ByteLRU(cache_bytes)
        self._poll_seconds = poll_seconds
        self._on_refresh = on_refresh
        self._lock = threading.Lock()
        self._revision = 0
        self._records: dict[str, Record] = {}
        self._matches: dict[str, str] = {}
        self._prompts: dict[str, str] = {}
        self._texts: ByteLRU[str] = ByteLRU(_TEXT_BYTES)
        self._static: dict[str, tuple[Record, V]] = {}
        self._loading = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.healthy = True

    def add_static(self, be_id: str, data: bytes) -> None:
        """Add a token to this process only (`--be-token`). Raises InvalidArtifact, and as `check`."""
        token = Token.from_bytes(data)
        self._check(token)
        record = Record(be_id, 1, file_digest(data), token.manifest, None, "server")
        self._static[be_id] = (record, self._prepare(token))

    def start(self) -> None:
        """Read the registry once, then start the thread that polls it. Raises RegistryError if the read fails."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, name="be-registry-poll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stop.set()

    def refresh(self) -> None:
        """Read all changes of the registry since the last refresh. Raises RegistryError."""
        with self._lock:
            revision, changes = self._registry.changes(self._revision)
            # Readers take no lock, so changes go into new dicts: a reader never sees a half-changed dict.
            records = dict(self._records) if changes else self._records
            prompts = dict(self._prompts) if changes else self._prompts
            if revision < self._revision:  # an older copy replaced the database: read everything again
                revision, changes = self._registry.changes(0)
                records, prompts = {}, {}
            for change in changes:
                if change.prompt_sha256 is None:
                    prompts.pop(change.id, None)
                else:
                    prompts[change.id] = change.prompt_sha256
                if change.record is None:
                    records.pop(change.id, None)
                else:
                    records[change.id] = change.record
            if records is not self._records:
                self._matches = {r.match_sha256: r.id for r in records.values() if r.match_sha256}
                self._records = records
            self._prompts = prompts
            self._revision = revision
        self._on_refresh(len(self._records) + len(self._static))

    def get(self, be_id: str) -> Record:
        """The record of an id. Raises TokenNotFound."""
        if be_id in self._static:
            return self._static[be_id][0]
        record = self._records.get(be_id)
        if record is None:
            raise TokenNotFound(f"No token {be_id!r} is registered on this server.", param="be_id")
        return record

    def has_prompt(self, be_id: str) -> bool:
        """Whether `prompt` has a text for an id, as of the last refresh."""
        found = self._static[be_id][0] if be_id in self._static else self._records.get(be_id)
        if found is None:
            return be_id in self._prompts
        return found.manifest.prompt.text is not None or (found.source == "registry" and found.stored_prompt)

    def prompt(self, be_id: str) -> str | None:
        """The text of an id's prompt from its file or the registry, also for a removed token; None if there is none.

        Returns only a text with the digest of the token's prompt. The first read of a stored text
        blocks on the database. Raises RegistryError.
        """
        found = self._static[be_id][0] if be_id in self._static else self._records.get(be_id)
        if found is not None and (found.manifest.prompt.text is not None or found.source == "server"):
            return found.manifest.prompt.text
        sha256 = self._prompts.get(be_id)
        if sha256 is None or (found is not None and sha256 != found.manifest.prompt.sha256):
            return None
        text = self._texts.get(sha256)
        if text is None:
            text = self._registry.read_prompt(be_id)
            if text is None or prompt_sha256(text) != sha256:  # the text changed since the last refresh
                return None
            self._texts.put(sha256, text, len(text.encode()))
        return text

    def match(self, sha256: str) -> Record | None:
        """The token registered with `match` for the prompt with this digest, or None."""
        be_id = self._matches.get(sha256)
        return self._records.get(be_id) if be_id is not None else None

    @property
    def has_matches(self) -> bool:
        """Whether any token is registered with `match`. If not, the server hashes no prompts."""
        return bool(self._matches)

    @property
    def revision(self) -> int:
        """The registry's revision at the last refresh. It grows with every change."""
        return self._revision

    def records(self) -> list[Record]:
        """All records, sorted by id."""
        merged = {**self._records, **{be_id: record for be_id, (record, _) in self._static.items()}}
        return [merged[be_id] for be_id in sorted(merged)]

    def cached(self, record: Record) -> V | None:
        """The prepared vectors if they are in memory, else None."""
        if record.source == "server":
            return self._static[record.id][1]
        return self._cache.get(record.digest)

    def load(self, record: Record) -> V:
        """The prepared vectors, from memory or else from the registry. Blocks on the database.

        Raises TokenNotFound if the token was removed or changed meanwhile, and InvalidArtifact or
        TooManyVectors if it does not fit this server.
        """
        found = self.cached(record)
        if found is not None:
            return found
        self.check_record(record)
        with self._loading:  # one load at a time, so that many first uses of a token read it once
            found = self.cached(record)
            if found is not None:
                return found
            data = self._registry.read_artifact(record.id, record.version)
            if file_digest(data) != record.digest:
                raise TokenNotFound(f"Token {record.id!r} has just changed; please try again.", param="be_id")
            token = Token.from_bytes(data)
            self._check(token)
            value = self._prepare(token)
            self._cache.put(record.digest, value, len(data))
            return value

    def keep(self, record: Record, token: Token, size: int) -> None:
        """Have the vectors of a checked token file of `size` bytes ready, as `load` would.

        For the process that has just registered the file: its first request reads no database.
        """
        if self._cache.get(record.digest) is None:
            self._cache.put(record.digest, self._prepare(token), size)

    def refuse_static(self, be_id: str) -> None:
        """Raise TokenConflict for an id given by `--be-token`."""
        if be_id in self._static:
            raise TokenConflict(
                f"Token {be_id!r} was given to this server by --be-token; change that option and restart the server."
            )

    def _poll(self) -> None:
        last_mark: object | None = None
        skips = 0
        while not self._stop.wait(self._poll_seconds):
            try:
                mark = self._registry.mark()
                skips = 0 if mark is None or mark != last_mark or skips >= _MAX_SKIPS else skips + 1
                if skips:
                    self._on_refresh(len(self._records) + len(self._static))
                else:
                    self.refresh()
                    last_mark = mark
            except Exception as exc:  # any error: the thread must go on, because it brings the removals
                if self.healthy:
                    logger.error(
                        "%s Tokens in memory still answer; changes arrive when the registry answers again.",
                        hide(str(exc)),
                    )
                self.healthy = False
            else:
                if not self.healthy:
                    logger.info("The registry answers again.")
                self.healthy = True
