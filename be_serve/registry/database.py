"""Opens connections to the registry's database, with their timeouts and SQLite's settings."""

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

_TIMEOUT = 15.0  # seconds to wait for a lock of another SQLite connection, or for a free connection of the pool
# With these values a lost network connection is noticed after about 10 seconds. The kernel's default is 15 minutes.
_PSYCOPG = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
_ENCODE = "In a user name or password write @ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25."


def what_failed(exc: Exception, url: str) -> str:
    """The text of a database error, without the URL's user and password (drivers quote them) and without row data."""
    text = str(getattr(exc, "orig", None) or exc)
    # PostgreSQL's DETAIL quotes the faulty row, which may contain a prompt.
    text = text.partition("\nDETAIL:")[0].strip().rstrip(".")
    return hide(text, credentials_in(url))


def use_wal(connection: Any) -> None:
    """Switch SQLite to the write-ahead log. Retries: while another connection switches, SQLite fails at once."""
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
    """The parts of the URL. Raises RegistryError without the URL's text, which may contain a password."""
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError):  # ValueError: the port is no number; its text quotes the port
        raise RegistryError(
            "BE_REGISTRY is no database URL. Use sqlite:////absolute/path.db or postgresql+psycopg://user@host/db. "
            f"{_ENCODE}"
        ) from None
    on_disk = backend == "sqlite"
    if on_disk and parsed.get_driver_name() != "pysqlcipher" and (parsed.host or parsed.username or parsed.password):
        raise RegistryError("BE_REGISTRY names a host for SQLite. Use sqlite:////absolute/path.db, with four slashes.")
    if on_disk and "@" in (parsed.database or "") and not str(parsed.database).startswith("/"):
        raise RegistryError(
            "BE_REGISTRY has an @ in a relative SQLite path, which looks like a user and a host. "
            "Use sqlite:////absolute/path.db, with four slashes."
        )
    # The end of the password would become part of the host, and DNS would be asked for it.
    if not on_disk and "@" in f"{parsed.host}{parsed.database}":
        raise RegistryError(f"BE_REGISTRY has an @ in its user name, password or database: {safe_url(url)}. {_ENCODE}")
    return parsed


def create_registry_engine(url: str) -> Engine:
    """An engine for the registry's database. Raises RegistryError.

    Errors are raised without their cause, because a traceback would print the cause's text with its secrets.
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
            # Tokens may stand for secret prompts, so only the owner may read the file. SQLite gives its WAL files
            # the same mode.
            os.close(os.open(parsed.database, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as exc:
            raise RegistryError(f"Cannot create {parsed.database}: {exc.strerror}. Name another file.") from exc
    try:
        engine = create_engine(parsed, connect_args={"timeout": _TIMEOUT}, hide_parameters=True)
    except (ModuleNotFoundError, SQLAlchemyError) as exc:
        raise RegistryError(f"Cannot use {safe_url(url)}: {what_failed(exc, url)}.") from None

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the listener below begins transactions
        use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")  # registrations are rare and must survive a power cut
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # Not IMMEDIATE by default: it would make readers wait for each other. WAL readers need no lock, and writers
        # queue on be_meta. A transaction that reads and then writes needs IMMEDIATE: SQLite refuses to upgrade a
        # read lock while another writer is active, and does not wait.
        immediate = connection.get_execution_options().get("be_immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine
