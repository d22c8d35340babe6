"""Connections to the registry's database: how long they wait, and what SQLite must be told."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from be_serve.core.errors import RegistryError

_TIMEOUT = 15.0  # seconds that a connection waits for another's lock on SQLite, or for a free one
# A database whose packets get lost is noticed within some ten seconds, not by the kernel's quarter of an hour.
_PSYCOPG = {
    "connect_timeout": 5,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


def safe(url: str) -> str:
    """The URL without its password and its query, which may hold one."""
    return make_url(url).set(query={}).render_as_string(hide_password=True)


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


def create_registry_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        # The text is not shown: a mistyped URL may hold a password.
        raise RegistryError(
            "BE_REGISTRY is no database URL. Use sqlite:////absolute/path.db or postgresql+psycopg://user@host/db."
        ) from exc
    if parsed.get_backend_name() != "sqlite":
        try:
            timeouts = _PSYCOPG if parsed.get_driver_name() in ("psycopg", "psycopg2") else {}
            return create_engine(parsed, pool_pre_ping=True, pool_timeout=_TIMEOUT, connect_args=timeouts)
        except (ModuleNotFoundError, SQLAlchemyError) as exc:
            raise RegistryError(f"Cannot use {safe(url)}: {exc}. For PostgreSQL install the extra [postgres].") from exc
    if parsed.database and parsed.database != ":memory:":
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Tokens stand for prompts that may be secret: the file is its owner's alone, and WAL files follow it.
            os.close(os.open(parsed.database, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as exc:
            raise RegistryError(f"Cannot create {parsed.database}: {exc.strerror}.") from exc
    engine = create_engine(parsed, connect_args={"timeout": _TIMEOUT})

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
