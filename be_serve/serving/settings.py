"""The server's settings: each option `--be-x` has an environment variable `BE_X`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from be_serve.core.artifact import MAX_BYTES
from be_serve.core.errors import InputError
from be_serve.core.ids import validate_be_id
from be_serve.models import be_home
from be_serve.serving.injection.base import INJECTIONS

_INJECTIONS = ("auto", *INJECTIONS)


@dataclass(frozen=True)
class Settings:
    """The operator's settings. Every server process reads the same values with `from_env`."""

    registry: str = field(repr=False)  # the URL may hold a password
    """Database URL of the registry (BE_REGISTRY). Default: a SQLite file in the cache folder."""
    tokens: dict[str, Path] = field(default_factory=dict)
    """Tokens in memory, id to file (BE_TOKEN: `ID=FILE`, separated by line ends)."""
    admin_key: str | None = field(default=None, repr=False)
    """Key of the /v1/be routes (BE_ADMIN_KEY). None: these routes answer 403."""
    injection: str = "auto"
    """How vectors reach the engine (BE_INJECTION). `auto`: the injection that the engine was started for."""
    rows: int = 1024
    """Rows for vectors on the workers, for all server processes together (BE_ROWS)."""
    match: bool = True
    """Whether a token registered with `match` answers a chat with its exact prompt (BE_MATCH)."""
    require: bool = False
    """Whether a chat that names no token is refused (BE_REQUIRE)."""
    max_upload: int = MAX_BYTES
    """Largest accepted token file in bytes (BE_MAX_UPLOAD)."""
    cache_bytes: int = 256 * 1024 * 1024
    """Memory for vectors per server process in bytes (BE_CACHE_BYTES)."""

    inflight_bytes: int = 1024 * 1024 * 1024
    """Bytes that all running requests with tokens may hold together, per server process (BE_INFLIGHT_BYTES)."""
    list_aliases: bool = True
    """Whether /v1/models lists the aliases of all tokens to every client (BE_LIST_ALIASES)."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the BE_* variables. Raises InputError, which names the faulty variable."""
        env = os.environ if env is None else env
        injection = env.get("BE_INJECTION") or "auto"
        if injection not in _INJECTIONS:
            raise InputError(f"BE_INJECTION={injection!r}: choose one of {', '.join(_INJECTIONS)}.")
        return cls(
            registry=env.get("BE_REGISTRY") or f"sqlite:///{be_home() / 'registry.db'}",
            tokens=dict(parse_token_option(entry) for entry in env.get("BE_TOKEN", "").splitlines() if entry),
            admin_key=env.get("BE_ADMIN_KEY") or None,
            injection=injection,
            rows=_positive(env.get("BE_ROWS") or "1024", "BE_ROWS"),
            match=_flag(env.get("BE_MATCH", "1"), "BE_MATCH"),
            require=_flag(env.get("BE_REQUIRE", "0"), "BE_REQUIRE"),
            max_upload=_positive(env.get("BE_MAX_UPLOAD") or str(MAX_BYTES), "BE_MAX_UPLOAD"),
            inflight_bytes=_positive(env.get("BE_INFLIGHT_BYTES") or str(1024**3), "BE_INFLIGHT_BYTES"),
            list_aliases=_flag(env.get("BE_LIST_ALIASES", "1"), "BE_LIST_ALIASES"),
            cache_bytes=_positive(env.get("BE_CACHE_BYTES") or str(256 * 1024 * 1024), "BE_CACHE_BYTES"),
        )


def parse_token_option(entry: str) -> tuple[str, Path]:
    """The id and the path of `ID=FILE`. Raises InputError."""
    be_id, equals, file = entry.partition("=")
    if not equals or not file:
        raise InputError(f"--be-token takes ID=FILE, not {entry!r}.")
    return validate_be_id(be_id, param="--be-token"), Path(file)


def _flag(text: str, name: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise InputError(f"{name}={text!r}: use 1 or 0.")


def _positive(text: str, name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise InputError(f"{name}={text!r}: use a whole number above 0.")
    return value
