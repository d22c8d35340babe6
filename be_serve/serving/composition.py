"""The tokens of one slot: usually one token, or several in sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from be_serve.core.artifact import Placement
from be_serve.core.errors import RequestError
from be_serve.registry import Record


class Composition:
    """One or more tokens in order, served as one token with k = k1 + k2 + ...

    Raises RequestError for tokens with different placements or template variables.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        first = records[0].manifest
        for record in records[1:]:
            manifest = record.manifest
            if (manifest.placement, manifest.template_kwargs) != (first.placement, first.template_kwargs):
                raise RequestError(
                    f"Tokens {records[0].id!r} and {record.id!r} cannot share a slot: their placement or template "
                    f"variables differ ({first.placement} {first.template_kwargs}, "
                    f"{manifest.placement} {manifest.template_kwargs}). Send one of them.",
                    param="be_id",
                )
        self.records = tuple(records)
        self.placement: Placement = first.placement
        self.template_kwargs: dict[str, Any] = dict(first.template_kwargs)
        self.k = sum(record.manifest.k for record in records)

    @property
    def name(self) -> str:
        """The ids, separated by commas. No id contains a comma."""
        return ",".join(record.id for record in self.records)

    @property
    def digest(self) -> str:
        """The digests, separated by commas."""
        return ",".join(record.digest for record in self.records)

    def replaces(self, sha256: str) -> bool:
        """Whether one of the tokens replaces the prompt with this digest."""
        return any(record.manifest.prompt.sha256 == sha256 for record in self.records)
