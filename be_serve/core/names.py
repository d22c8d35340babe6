"""The names of the be-serve request fields, and a search for slips: misspelt or misplaced keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("be_id", "be_system", "be_match", "be_fallback")
PLACES = ("extra_body", "vllm_xargs", "metadata", "chat_template_kwargs")
"""Objects of a request in which clients put be-serve fields by mistake. The fields belong at the top level."""

_SEPARATORS = str.maketrans("", "", "-_ ")
_PLAIN = {name.translate(_SEPARATORS): name for name in FIELDS}
_SHORTEST, _LONGEST = min(map(len, _PLAIN)) - 1, max(map(len, _PLAIN)) + 1
_HEAD = "be"
_MAX_KEY_CHARS = 64


@dataclass(frozen=True)
class Slip:
    """A key that is meant as a be-serve field but is not read."""

    key: str
    """The key in the request, after the name of its object and a dot. Shortened for messages."""
    field: str
    """The field that the key is meant as."""
    place: str | None
    """The object that contains the key; None at the top level."""


def field_near(key: object) -> str | None:
    """The field that differs from a key by at most one edit, or None. Ignores case, `-`, `_` and spaces."""
    if not isinstance(key, str):
        return None
    plain = key.lower().translate(_SEPARATORS)
    if not _SHORTEST <= len(plain) <= _LONGEST:
        return None
    head = plain.startswith(_HEAD)
    for name, field in _PLAIN.items():
        # One edit changes only the head or only the rest of a field. This check alone rejects nearly every key.
        if (head or plain.endswith(name[len(_HEAD) :])) and _within_one_edit(plain, name):
            return field
    return None


def find_slip(top: Mapping[str, Any], *requests: Mapping[str, Any], read_in: Collection[str] = ()) -> Slip | None:
    """The first slip in the keys of `top` and in the PLACES of `requests`, or None. A null value counts as absent.

    The server reads a field at the top level and, by its exact name, in the places of `read_in`. Places that
    are no objects, and deeper levels, are not searched.
    """
    for key, value in top.items():
        if value is not None and key not in FIELDS and (field := field_near(key)):
            return Slip(_printable(key), field, None)
    for request in requests:
        for place in PLACES:
            inside = request.get(place)
            if not inside or not isinstance(inside, Mapping):
                continue
            for key, value in inside.items():
                field = field_near(key) if value is not None else None
                if field and not (key == field and place in read_in):
                    return Slip(f"{place}.{_printable(key)}", field, place)
    return None


def _printable(key: str) -> str:
    """A client's key for a message: shortened, and without lone surrogates, which cannot be encoded."""
    return key[:_MAX_KEY_CHARS].encode(errors="replace").decode()


def _within_one_edit(one: str, other: str) -> bool:
    """Whether the Levenshtein distance of two strings is 0 or 1."""
    short, long = (one, other) if len(one) < len(other) else (other, one)
    if len(long) - len(short) > 1:
        return False
    same = 0
    while same < len(short) and short[same] == long[same]:
        same += 1
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]
