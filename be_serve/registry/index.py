"""The in-memory view of the registry that requests are answered from.

Resolving an id touches no database: a thread polls the registry's revision and
fetches only what changed. Vectors lie in a byte-bounded LRU: from registration on in
the process that took the upload, from first use on in all others.
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
_MOST_UNREAD = 20
"""How often in a row the registry's mark is believed to say that nothing changed."""


class ByteLRU(Generic[V]):
    """A least-recently-used cache bounded by the sum of its values' sizes in bytes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._lock = threading.Lock()
        self._items: OrderedDict[str, tuple[V, int]] = OrderedDict()

    def get(self, key: str) -> V | None:
        """The value, now the most recently used; None where it is not held."""
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[0]

    def put(self, key: str, value: V, size: int) -> None:
        """Hold a value of `size` bytes; one larger than the capacity is not held."""
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
    """Tokens by id and by prompt digest.

    `prepare` turns a checked Token into what the server injects (a tensor in the
    serving dtype); its result is cached. `check` raises for a token that this
    server must not serve; such a token is listed, and refused when it is used. `check_record`
    does so by the manifest alone, before anything is read.
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
        """Add a token that lives in this process only (`--be-token`)."""
        token = Token.from_bytes(data)
        self._check(token)
        record = Record(be_id, 1, file_digest(data), token.manifest, None, "server")
        self._static[be_id] = (record, self._prepare(token))

    def start(self) -> None:
        """Read the registry once (raising where it cannot be read) and poll it from now on."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, name="be-registry-poll", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling."""
        self._stop.set()

    def refresh(self) -> None:
        """Take over all changes since the last refresh. Raises RegistryError."""
        with self._lock:
            revision, changes = self._registry.changes(self._revision)
            # Readers take no lock, so they get whole new dicts and never a half-changed one.
            records = dict(self._records) if changes else self._records
            prompts = dict(self._prompts) if changes else self._prompts
            if revision < self._revision:  # the database was replaced by an older copy
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
        """Whether `prompt` has a text for an id, as far as this process knows."""
        found = self._static[be_id][0] if be_id in self._static else self._records.get(be_id)
        if found is None:
            return be_id in self._prompts
        return found.manifest.prompt.text is not None or (found.source == "registry" and found.stored_prompt)

    def prompt(self, be_id: str) -> str | None:
        """The text of an id's prompt, of a removed token too, where its file or the registry holds it.

        A text of another prompt than the token's does not count. Blocks on the database
        where a stored text is read for the first time. Raises RegistryError.
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
            if text is None or prompt_sha256(text) != sha256:  # it has just changed
                return None
            self._texts.put(sha256, text, len(text.encode()))
        return text

    def match(self, sha256: str) -> Record | None:
        """The token registered to answer for the prompt of this digest, if any."""
        be_id = self._matches.get(sha256)
        return self._records.get(be_id) if be_id is not None else None

    @property
    def has_matches(self) -> bool:
        """Whether any token is registered with `match`: else no request needs hashing."""
        return bool(self._matches)

    @property
    def revision(self) -> int:
        """Grows with every change of the registry that this process has taken over."""
        return self._revision

    def records(self) -> list[Record]:
        """All records, sorted by id."""
        merged = {**self._records, **{be_id: record for be_id, (record, _) in self._static.items()}}
        return [merged[be_id] for be_id in sorted(merged)]

    def cached(self, record: Record) -> V | None:
        """The prepared vectors if they are in memory."""
        if record.source == "server":
            return self._static[record.id][1]
        return self._cache.get(record.digest)

    def load(self, record: Record) -> V:
        """The prepared vectors, read from the registry where needed; blocks on the database.

        Raises TokenNotFound where it was removed meanwhile, InvalidArtifact where it
        does not fit this server.
        """
        found = self.cached(record)
        if found is not None:
            return found
        self.check_record(record)
        with self._loading:  # one load at a time: many first uses of a token read it once
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
        """Raise TokenConflict for an id that `--be-token` holds."""
        if be_id in self._static:
            raise TokenConflict(f"Token {be_id!r} was given to this server by --be-token; restart it to change that.")

    def _poll(self) -> None:
        seen: object | None = None
        unread = 0
        while not self._stop.wait(self._poll_seconds):
            try:
                mark = self._registry.mark()
                unread = 0 if mark is None or mark != seen or unread >= _MOST_UNREAD else unread + 1
                if unread:
                    self._on_refresh(len(self._records) + len(self._static))
                else:
                    self.refresh()
                    seen = mark
            except Exception as exc:  # whatever it is, the thread must live: it is how removals arrive
                if self.healthy:
                    logger.error("%s Known tokens go on answering; changes wait for the registry.", hide(str(exc)))
                self.healthy = False
            else:
                if not self.healthy:
                    logger.info("The registry answers again.")
                self.healthy = True
