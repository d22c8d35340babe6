"""Our request fields by name, and keys that are a slip of one: misspelt, or put where nobody reads it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("be_id", "be_system", "be_match", "be_fallback")
PLACES = ("extra_body", "vllm_xargs", "metadata", "chat_template_kwargs")
"""Objects of a request in which clients put fields that belong beside them."""

_SEPARATORS = str.maketrans("", "", "-_ ")
_PLAIN = {name.translate(_SEPARATORS): name for name in FIELDS}
_SHORTEST, _LONGEST = min(map(len, _PLAIN)) - 1, max(map(len, _PLAIN)) + 1
_HEAD = "be"
_SHOWN = 64


@dataclass(frozen=True)
class Slip:
    """A key that is meant for a field of ours and is not read."""

    key: str
    """As the request has it, behind its object's name and a dot; cut to a length that can be shown."""
    field: str
    """The field that it is meant for."""
    place: str | None
    """The object in which it stands; None at the top level."""


def field_near(key: object) -> str | None:
    """The field within one edit of a key; None where there is none. Case, `-`, `_` and spaces do not count."""
    if not isinstance(key, str):
        return None
    plain = key.lower().translate(_SEPARATORS)
    if not _SHORTEST <= len(plain) <= _LONGEST:
        return None
    head = plain.startswith(_HEAD)
    for name, field in _PLAIN.items():
        # One edit leaves the head or the tail of a field as it is: this ends the search for nearly every key.
        if (head or plain.endswith(name[len(_HEAD) :])) and _within_one_edit(plain, name):
            return field
    return None


def find_slip(top: Mapping[str, Any], *requests: Mapping[str, Any], read_in: Collection[str] = ()) -> Slip | None:
    """The first slip among the keys of `top` and in the PLACES of `requests`; null is as good as absent.

    A field is read at the top level and, by its exact name, in the places that `read_in` names. Places that are
    no objects, and what lies deeper, are the endpoint's own affair.
    """
    for key, value in top.items():
        if value is not None and key not in FIELDS and (field := field_near(key)):
            return Slip(_shown(key), field, None)
    for request in requests:
        for place in PLACES:
            inside = request.get(place)
            if not inside or not isinstance(inside, Mapping):
                continue
            for key, value in inside.items():
                field = field_near(key) if value is not None else None
                if field and not (key == field and place in read_in):
                    return Slip(f"{place}.{_shown(key)}", field, place)
    return None


def _shown(key: str) -> str:
    """A client's key as a message can carry it: half a surrogate pair cannot be encoded."""
    return key[:_SHOWN].encode(errors="replace").decode()


def _within_one_edit(one: str, other: str) -> bool:
    """Whether the Levenshtein distance of two strings is 0 or 1."""
    short, long = (one, other) if len(one) < len(other) else (other, one)
    if len(long) - len(short) > 1:
        return False
    same = 0
    while same < len(short) and short[same] == long[same]:
        same += 1
    return short[same + (len(short) == len(long)) :] == long[same + 1 :]
