"""Stores tokens in a SQL database: SQLite (WAL) by default, or PostgreSQL to share it between hosts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ValidationError
from sqlalchemy import delete, insert, inspect, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from be_serve.core.artifact import Manifest, Token, file_digest
from be_serve.core.errors import InvalidArtifact, RegistryError, SchemaMismatch, TokenConflict, TokenNotFound
from be_serve.core.ids import validate_be_id
from be_serve.core.prompts import prompt_sha256
from be_serve.core.redaction import safe_url
from be_serve.registry.database import create_registry_engine, what_failed
from be_serve.registry.schema import SCHEMA_VERSION, Base, Meta, PromptRow, TokenRow, VersionRow

logger = logging.getLogger("vllm.be_serve.registry")


@dataclass(frozen=True)
class Record:
    """One registered version, without its vectors."""

    id: str
    version: int
    digest: str
    manifest: Manifest
    match_sha256: str | None = None
    source: Literal["registry", "server"] = "registry"
    """`server`: given by `--be-token`, in memory only."""
    stored_prompt: bool = False
    """Whether the registry has the prompt's text, for requests with `be_fallback`."""

    def public(self) -> dict[str, Any]:
        """The record for the HTTP API: the manifest and the digest, without vectors and without the prompt's text."""
        manifest = self.manifest.model_dump(mode="json", exclude={"prompt": {"text"}})
        manifest["id"] = self.id
        return {
            "object": "be.token",
            **manifest,
            "version": self.version,
            "digest": self.digest,
            "match": self.match_sha256 is not None,
            "source": self.source,
            "fallback": self.stored_prompt or self.manifest.prompt.text is not None,
        }


@dataclass(frozen=True)
class PutResult:
    """The result of a registration."""

    record: Record
    created: bool
    """False if the same digest was already registered under the id."""


@dataclass(frozen=True)
class Change:
    """The current state of an id that changed: its record, or None if it was removed."""

    id: str
    record: Record | None
    prompt_sha256: str | None = None
    """Digest of the stored prompt, or None. A stored prompt stays when its token is removed."""


_IMMEDIATE = {"be_immediate": True}


class Registry:
    """Tokens in a SQL database.

        registry = Registry("sqlite:///tokens.db")
        registry.put(Path("captain.safetensors").read_bytes())
        registry.read_artifact("captain", 1)

    A registered version never changes. Every method opens its own transaction. Any thread may call
    every method but `mark`. Raises RegistryError if the database fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = create_registry_engine(url)
        database = self._engine.url.database
        on_disk = self._engine.url.get_backend_name() == "sqlite" and database and database != ":memory:"
        self._file = database if on_disk else None
        self._watch: Any = None
        """The connection that `mark` uses."""
        with self._errors():
            self._prepare()

    def put(
        self,
        data: bytes,
        *,
        be_id: str | None = None,
        match: bool | None = None,
        replace: bool = False,
        token: Token | None = None,
    ) -> PutResult:
        """Register a token file's bytes under `be_id`, or the id in its manifest.

        `token` holds the parsed and checked bytes, from a caller that has them already.
        To register the same digest again is no error and changes only `match`. With `match`
        None it stays as it is; a new version keeps it if the prompt is the same. Raises
        InvalidArtifact. Raises TokenConflict for another digest without `replace`, and for
        a prompt that another token already matches.
        """
        token = token or Token.from_bytes(data)
        token_id = validate_be_id(be_id if be_id is not None else token.manifest.id, param="id")
        digest = file_digest(data)
        wanted = token.manifest.prompt.sha256 if match else None
        if wanted == prompt_sha256(""):
            raise InvalidArtifact(
                "This token's prompt is empty, so with match it would answer every empty system message. "
                "Leave out match."
            )
        with self._errors(), Session(self._engine) as session, session.begin():
            revision = self._next_revision(session)
            row = session.get(TokenRow, token_id)
            current = session.get(VersionRow, (token_id, row.version)) if row and not row.removed else None
            if current is not None and current.digest == digest:
                assert row is not None
                if match is not None and row.match_sha256 != wanted:
                    self._claim_match(session, token_id, wanted)
                    row.match_sha256, row.revision = wanted, revision
                record = _record(row, current, token.manifest, self._stored_digest(session, token_id))
                return PutResult(record, created=False)
            if current is not None and not replace:
                raise TokenConflict(
                    f"Token {token_id!r} is registered with digest {current.digest}; this file has {digest}. "
                    "Send replace=true (`be-serve register --replace`) to make it a new version, or choose another id."
                )
            self._claim_match(session, token_id, wanted)
            if row is None:
                row = TokenRow(id=token_id, version=1, revision=revision, removed=False, match_sha256=wanted)
                session.add(row)
            else:
                row.version, row.revision, row.removed = row.version + 1, revision, False
                inherited = row.match_sha256 if row.match_sha256 == token.manifest.prompt.sha256 else None
                row.match_sha256 = inherited if match is None else wanted
            session.flush()
            session.execute(
                insert(VersionRow).values(
                    id=token_id,
                    version=row.version,
                    digest=digest,
                    manifest=token.manifest.model_dump_json(),
                    artifact=data,
                    created_at=datetime.now(UTC),
                )
            )
            # Remove a stored text of another prompt: it must not answer for this token.
            other = (PromptRow.id == token_id) & (PromptRow.sha256 != token.manifest.prompt.sha256)
            session.execute(delete(PromptRow).where(other))
            version = session.get_one(VersionRow, (token_id, row.version))
            record = _record(row, version, token.manifest, self._stored_digest(session, token_id))
            return PutResult(record, created=True)

    def store_prompt(self, be_id: str, text: str) -> None:
        """Store the prompt's text of a registered token, for requests with `be_fallback`.

        Raises TokenNotFound, and InvalidArtifact if the text is not the token's prompt.
        """
        with self._errors(), Session(self._engine) as session, session.begin():
            revision = self._next_revision(session)
            row = session.get(TokenRow, be_id)
            current = session.get(VersionRow, (be_id, row.version)) if row and not row.removed else None
            if row is None or current is None:
                raise TokenNotFound(f"No token {be_id!r} is registered.")
            expected, given = Manifest.model_validate_json(current.manifest).prompt.sha256, prompt_sha256(text)
            if given != expected:
                raise InvalidArtifact(
                    f"This text is not the prompt of token {be_id!r}: the text's SHA-256 is {given}, the prompt's is "
                    f"{expected}. Send the prompt that the token was trained on."
                )
            # Without trailing white space, as in the digest.
            session.merge(PromptRow(id=be_id, sha256=given, text=text.rstrip()))
            row.revision = revision

    def read_prompt(self, be_id: str) -> str | None:
        """The stored prompt text of an id, also of a removed id; None if none is stored."""
        with self._errors(), Session(self._engine) as session:
            return session.scalar(select(PromptRow.text).where(PromptRow.id == be_id))

    def remove(self, be_id: str, *, prompt: bool = False) -> None:
        """Remove a token with all its versions, and its stored prompt if `prompt`. Raises TokenNotFound.

        Without `prompt` the text stays, so requests with `be_fallback` are still answered.
        """
        with self._errors(), Session(self._engine) as session, session.begin():
            revision = self._next_revision(session)
            row = session.get(TokenRow, be_id)
            kept = session.get(PromptRow, be_id) if prompt else None
            if kept is not None:
                session.delete(kept)
            if row is not None and row.removed and kept is not None:
                row.revision = revision
                return  # the token was removed before; this call removed its prompt
            if row is None or row.removed:
                raise TokenNotFound(f"No token {be_id!r} is registered.")
            # The row stays, marked as removed: other replicas read it, and version numbers never repeat.
            row.removed, row.match_sha256, row.revision = True, None, revision
            session.execute(delete(VersionRow).where(VersionRow.id == be_id))

    def changes(self, since: int = 0) -> tuple[int, list[Change]]:
        """The current revision, and the current state of every id that changed after revision `since`."""
        with self._errors(), Session(self._engine) as session:
            revision = session.scalar(select(Meta.revision).where(Meta.id == 1)) or 0
            if revision == since:
                return revision, []
            rows = session.execute(
                select(TokenRow, VersionRow, PromptRow.sha256)
                .outerjoin(VersionRow, (VersionRow.id == TokenRow.id) & (VersionRow.version == TokenRow.version))
                .outerjoin(PromptRow, PromptRow.id == TokenRow.id)
                .where(TokenRow.revision > since)
            ).all()
            found = [
                Change(row.id, None if row.removed else _readable(row, version, prompt), prompt)
                for row, version, prompt in rows
            ]
            return revision, found

    def mark(self) -> object | None:
        """A value that differs from the last one if the registry may have changed; None if only `changes` can tell.

        Costs much less than `changes`: servers ask twice a second. Call it from one thread only.
        """
        if self._file is None:
            return None
        with self._errors():
            watch: Any = self._watch or self._engine.raw_connection()
            self._watch = watch
            # SQLite changes this number with every commit of another connection, in any process.
            version = watch.driver_connection.execute("PRAGMA data_version").fetchone()[0]
            try:
                found = os.stat(self._file)  # notices a replaced file, whose old copy the connection still reads
            except OSError:
                return None
            return version, found.st_dev, found.st_ino

    def read_artifact(self, be_id: str, version: int) -> bytes:
        """The bytes of a registered version. Raises TokenNotFound."""
        with self._errors(), Session(self._engine) as session:
            query = select(VersionRow.artifact).where(VersionRow.id == be_id, VersionRow.version == version)
            data = session.scalar(query)
        if data is None:
            raise TokenNotFound(f"No token {be_id!r} is registered.")
        return bytes(data)

    def close(self) -> None:
        """Close all connections."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._engine.dispose()

    def _prepare(self) -> None:
        """Create the missing tables. Raises SchemaMismatch for a database with another schema version."""
        if inspect(self._engine).has_table(Meta.__tablename__):
            self._check_version()
        if self._missing_tables():
            try:
                # One transaction for the tables and their first row: a process that starts now sees all or nothing.
                with self._engine.connect().execution_options(**_IMMEDIATE) as connection, connection.begin():
                    Base.metadata.create_all(connection)
                    if connection.scalar(select(Meta.id)) is None:
                        connection.execute(insert(Meta).values(id=1, schema_version=SCHEMA_VERSION, revision=0))
            except SQLAlchemyError:
                # Another process may have created them at the same time. If not, raise the error.
                if self._missing_tables():
                    raise
        self._check_version()

    def _check_version(self) -> None:
        with Session(self._engine) as session:
            found = session.get_one(Meta, 1).schema_version
        if found != SCHEMA_VERSION:
            raise SchemaMismatch(
                f"The registry {safe_url(self.url)} has schema version {found}, this be-serve reads {SCHEMA_VERSION}. "
                + (
                    "Upgrade be-serve."
                    if found > SCHEMA_VERSION
                    else "Use a new database (--be-registry) and register your token files there."
                )
            )

    def _missing_tables(self) -> bool:
        """Whether tables are missing: all of them in a new database, be_prompt in one of an early be-serve."""
        return not {*Base.metadata.tables} <= {*inspect(self._engine).get_table_names()}

    def _next_revision(self, session: Session) -> int:
        """Increment the revision and return it. The row's lock makes writers queue, so revisions commit in order."""
        session.execute(update(Meta).where(Meta.id == 1).values(revision=Meta.revision + 1))
        return session.scalars(select(Meta.revision).where(Meta.id == 1)).one()

    @staticmethod
    def _stored_digest(session: Session, be_id: str) -> str | None:
        return session.scalar(select(PromptRow.sha256).where(PromptRow.id == be_id))

    def _claim_match(self, session: Session, be_id: str, sha256: str | None) -> None:
        if sha256 is None:
            return
        query = select(TokenRow.id).where(TokenRow.match_sha256 == sha256, TokenRow.id != be_id)
        holder = session.scalar(query)
        if holder is not None:
            raise TokenConflict(
                f"Token {holder!r} already answers for this prompt, and only one can: register the file of {holder!r} "
                f"again with match=false (`be-serve register FILE --id {holder} --no-match`), or remove {holder!r}.",
                param="match",
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as exc:
            text = f"The registry {safe_url(self.url)} failed: {what_failed(exc, self.url)}."
            raise RegistryError(text) from None  # a traceback would print the driver's text with its secrets


def _record(row: TokenRow, version: VersionRow, manifest: Manifest, prompt: str | None) -> Record:
    """The record; `prompt` is the SHA-256 of the text that is stored under the id."""
    stored = prompt == manifest.prompt.sha256
    return Record(row.id, version.version, version.digest, manifest, row.match_sha256, stored_prompt=stored)


def _readable(row: TokenRow, version: VersionRow | None, prompt: str | None) -> Record | None:
    """The record, or None (and a log line) if this be-serve cannot read it. Other tokens must still be read."""
    if version is None:
        return None
    try:
        return _record(row, version, Manifest.model_validate_json(version.manifest), prompt)
    except ValidationError as exc:
        # Not the error's own text, which quotes the manifest and may contain the prompt.
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in exc.errors())
        logger.error(
            "Token %s is left out, because this be-serve cannot read its manifest: %s. Register it again.",
            row.id,
            faults,
        )
        return None
