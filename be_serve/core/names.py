"""The names of the be-serve request fields, and a search for slips: misspelt or misplaced keys."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIELDS = ("be_id", "be_system", "be_match", "be_fallback")
PLACES = ("extra_body", "vllm_xargs", "metadata", "chat_template_kwargs")
"""Objects of a request in which clients put be-serve fields by mistake. The fields belong at the top level."""

_OTHERS = frozenset({"metadata", "chat_template_kwargs"})
"""The places whose keys belong to others: to the client, or to the model's chat template."""

_SEPARATORS = str.maketrans("", "", "-_ ")
_PLAIN = {name.translate(_SEPARATORS): name for name in FIELDS}
_SHORTEST, _LONGEST = min(map(len, _PLAIN)) - 1, max(map(len, _PLAIN)) + 1
_HEAD = "be"
_WRAPPER = "extra_body"
_MAX_KEY_CHARS = 64
_MAX_READ = 1000
_INDEX = re.compile(r"\[\d*\]$")  # PHP and form encoders write lists as `be_id[]`
# `be` as a word of its own. `be_ids` and `beIds` have it; `bed` and `BEAD` do not.
_MARK = re.compile(r"[-_ ]*(?:[bB][eE][-_ ]|[bB]e[A-Z])")


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
    """The field that differs from a key by at most one edit, or None. Ignores case, `-`, `_` and spaces.

    Two swapped letters count as one edit. Unicode's other forms of a letter count as the letter.
    """
    if not isinstance(key, str):
        return None
    plain = _plain(key)
    if not _SHORTEST <= len(plain) <= _LONGEST:
        return None
    head = plain.startswith(_HEAD)
    for name, field in _PLAIN.items():
        # One edit leaves the head or everything behind the head's neighbour. This check alone rejects nearly every key.
        if (head or plain.endswith(name[len(_HEAD) + 1 :])) and _within_one_edit(plain, name):
            return field
    return None


def field_meant(key: object) -> str | None:
    """The field that a key among the keys of others certainly means, or None.

    The key is a field but for case and separators, or it is near a field and has `be` as a word of its own.
    Words such as `bid`, `bed` or `rematch` are near a field by chance.
    """
    field = field_near(key)
    if field is None or not isinstance(key, str):
        return None
    return _PLAIN.get(_plain(key)) or (field if _MARK.match(_folded(key)) else None)


def field_of_header(name: str) -> str | None:
    """The field that a request header or query parameter is named after, such as `x-be-id`, or None."""
    return _PLAIN.get(_plain(name.lower().removeprefix("x-")))


def find_slip(top: Mapping[str, Any], *requests: Mapping[str, Any], read_in: Collection[str] = ()) -> Slip | None:
    """The first slip in the keys of `top` and in the PLACES of `requests`, or None. A null value counts as absent.

    The server reads a field at the top level and, by its exact name, in the places of `read_in`. Other places
    and deeper levels are not searched, but for `extra_body`: it may be a list or JSON text, and may contain
    itself once more with one of the fields.
    """
    for key, value in top.items():
        if value is not None and key not in FIELDS and (field := field_near(key)):
            return Slip(_printable(key), field, None)
    for request in requests:
        for place in PLACES:
            near = field_meant if place in _OTHERS else field_near
            for inside in _objects(request.get(place), place):
                for key, value in inside.items():
                    field = near(key) if value is not None else None
                    if field and not (key == field and place in read_in):
                        return Slip(f"{place}.{_printable(key)}", field, place)
                for deeper in _objects(inside.get(_WRAPPER), _WRAPPER) if place == _WRAPPER else ():
                    for key, value in deeper.items():
                        if value is not None and isinstance(key, str) and (field := _PLAIN.get(_plain(key))):
                            return Slip(f"{place}.{_WRAPPER}.{_printable(key)}", field, place)
    return None


def _objects(value: Any, place: str) -> Iterator[Mapping[Any, Any]]:
    """The objects that a place holds: its value or, of `extra_body`, also the items of a list and of JSON text."""
    if place == _WRAPPER and isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return
    items = value if place == _WRAPPER and isinstance(value, list) else [value]
    yield from (item for item in items if isinstance(item, Mapping))


def _folded(key: str) -> str:
    """A key without an index at its end, with the letters in their plain Unicode form. Reads the first letters only."""
    key = key[:_MAX_READ]
    return _INDEX.sub("", key if key.isascii() else unicodedata.normalize("NFKC", key))


def _plain(key: str) -> str:
    return _folded(key).lower().translate(_SEPARATORS)


def _printable(key: str) -> str:
    """A client's key for a message: shortened, and without lone surrogates, which cannot be encoded."""
    return key[:_MAX_KEY_CHARS].encode(errors="replace").decode()


def _within_one_edit(one: str, other: str) -> bool:
    """Whether one inserted, deleted or replaced letter, or two swapped neighbours, or nothing, makes the difference."""
    short, long = (one, other) if len(one) < len(other) else (other, one)
    if len(long) - len(short) > 1:
        return False
    same = 0
    while same < len(short) and short[same] == long[same]:
        same += 1
    if short[same + (len(short) == len(long)) :] == long[same + 1 :]:
        return True
    return len(short) == len(long) and short[same:] == long[same + 1] + long[same] + long[same + 2 :]
