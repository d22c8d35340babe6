"""Connections to the registry's database: how long they wait, and what SQLite must be told."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from be_serve.core.errors import RegistryError
from be_serve.core.redaction import credentials_in, hide, safe_url

_TIMEOUT = 15.0  # seconds that a connection waits for another's lock on SQLite, or for a free one
# A database whose packets get lost is noticed within some ten seconds, not by the kernel's quarter of an hour.
_PSYCOPG = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_ENCODE = "In a user name or password write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25."


def what_failed(exc: Exception, url: str) -> str:
    """An error's text without any part of the URL's user-info, which drivers quote, and without data of rows."""
    text = str(getattr(exc, "orig", None) or exc)
    # PostgreSQL's DETAIL quotes the row at fault, which may hold a prompt.
    text = text.partition("\nDETAIL:")[0].strip().rstrip(".")
    return hide(text, credentials_in(url))


def use_wal(connection: Any) -> None:
    """Switch to the write-ahead log. SQLite does not wait for others that are just switching, but fails at once."""
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _parsed(url: str) -> URL:
    """The URL's parts. Raises RegistryError, of which nothing shows the URL: a mistyped one may hold a password."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):  # the second: a port that is no number, quoted
        raise RegistryError(
            "BE_REGISTRY is no database URL. Use sqlite:////absolute/path.db or postgresql+psycopg://user@host/db. "
            f"{_ENCODE}"
        ) from None
    on_disk = backend == "sqlite"
    if on_disk and parsed.get_driver_name() != "pysqlcipher" and (parsed.host or parsed.username or parsed.password):
        raise RegistryError("BE_REGISTRY names a host for SQLite. Use sqlite:////absolute/path.db, with four slashes.")
    # The host would be looked up, in DNS too, with the end of the password before it.
    if not on_disk and "@" in f"{parsed.host}{parsed.database}":
        raise RegistryError(f"BE_REGISTRY has an @ in its user name, password or database: {safe_url(url)}. {_ENCODE}")
    return parsed


def create_registry_engine(url: str) -> Engine:
    """An engine for the registry's database. Raises RegistryError.

    The errors are raised without their causes: a traceback would show the texts of those.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        try:
            timeouts = _PSYCOPG if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
            return create_engine(
                parsed, pool_pre_ping=True, pool_timeout=_TIMEOUT, connect_args=timeouts, hide_parameters=True
            )
        except (ModuleNotFoundError, SQLAlchemyError) as exc:
            raise RegistryError(
                f"Cannot use {safe_url(url)}: {what_failed(exc, url)}. For PostgreSQL install the extra [postgres]."
            ) from None
    if parsed.database and parsed.database != ":memory:":
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Tokens stand for prompts that may be secret: the file is its owner's alone, and WAL files follow it.
            os.close(os.open(parsed.database, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as exc:
            raise RegistryError(f"Cannot create {parsed.database}: {exc.strerror}.") from exc
    try:
        engine = create_engine(parsed, connect_args={"timeout": _TIMEOUT}, hide_parameters=True)
    except (ModuleNotFoundError, SQLAlchemyError) as exc:
        raise RegistryError(f"Cannot use {safe_url(url)}: {what_failed(exc, url)}.") from None

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun by the listener below
        use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")  # registrations are rare and must survive a power cut
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # IMMEDIATE would also serialise readers' begins; WAL readers need no lock, writers queue on be_meta.
        # A transaction that reads and then writes needs it: SQLite refuses the upgrade at once, without waiting.
        immediate = connection.get_execution_options().get("be_immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine
