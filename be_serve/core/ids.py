"""The syntax of token ids and of model aliases."""

from __future__ import annotations

import re
from collections.abc import Iterable

from be_serve.core.errors import InvalidBeId

_BE_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def validate_be_id(value: object, *, param: str = "be_id") -> str:
    """Return `value` if it is a token id: 1 to 64 of `a-z 0-9 . _ -`, the first a letter or digit.

    Raises InvalidBeId for all other values.
    """
    if not isinstance(value, str):
        raise InvalidBeId(f"`{param}` must be a string, not {type(value).__name__}.", param=param)
    if not _BE_ID.fullmatch(value):
        shortened = value if len(value) <= 80 else value[:77] + "..."
        raise InvalidBeId(
            f"{shortened!r} is no token id. Use 1 to 64 characters of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit.",
            param=param,
        )
    return value


def alias_of(base_model: str, be_id: str) -> str:
    """The model name that selects a token: `base:be_id`."""
    return f"{base_model}:{be_id}"


def split_alias(model: str | None, base_models: Iterable[str]) -> tuple[str, str] | None:
    """Split an alias `base:be_id` at one of the base names, which may contain colons.

    Returns (base, rest), or None if `model` does not begin with a base name and a colon.
    Does not validate `rest`: the caller must.
    """
    if not model:
        return None
    names = list(base_models)
    if model in names:
        return None
    # Longest name first: if `a` and `a:b` are both served, `a:b:x` is an alias of `a:b`.
    for base in sorted(names, key=len, reverse=True):
        if model.startswith(base + ":"):
            return base, model[len(base) + 1 :]
    return None
