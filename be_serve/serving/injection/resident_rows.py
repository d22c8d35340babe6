"""Injection `resident-rows`: vectors are in rows of a table on the workers, and a request is plain token ids.

When a row gets the vectors of another token, KV blocks of the old token are never used for the new one:
the token's digest is part of the request's `cache_salt`, and vLLM hashes KV blocks with that salt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from be_serve.core.slots import Slot
from be_serve.serving.injection.row_pool import Lease, RowPool


class RowIds(list[int]):
    """Prompt ids that include ids of rows. Only this process can create one, because clients send plain lists.

    `plain` holds the ids of the vocabulary. `lease` holds the rows; None in the proof at start-up.
    """

    def __init__(self, before: list[int], rows: list[int], after: list[int], lease: Lease | None) -> None:
        super().__init__([*before, *rows, *after])
        self.plain = [*before, *after]
        self.lease = lease


class HeldRows:
    """The rows of one request, and the digests of the tokens in these rows."""

    def __init__(self, lease: Lease, digest: str) -> None:
        self.lease = lease
        self.digest = digest

    def release(self) -> None:
        self.lease.release()


class ResidentRows:
    """Injection `resident-rows`. `first` is the id of row 0."""

    name = "resident-rows"
    beside_media = True
    outlasts_request = True

    def __init__(self, pool: RowPool, first: int) -> None:
        self._pool = pool
        self._first = first
        self.capacity = pool.capacity

    def check(self, messages: Any, tools: Any) -> None:
        """Accepts everything: the engine takes no embeddings, and no text is tokenised to a row's id."""

    async def hold(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True, choices: int = 1) -> HeldRows:
        return HeldRows(await self._pool.lease(parts, wait=wait), ",".join(digest for digest, _ in parts))

    def inject(self, engine_input: dict[str, Any], slot: Slot, held: HeldRows) -> dict[str, Any]:
        """The engine input with the ids of the rows in the slot."""
        ids: list[int] = engine_input["prompt_token_ids"]
        start, k = len(slot.before), len(held.lease.rows)
        rows = [self._first + row for row in held.lease.rows]
        return {
            **engine_input,
            "prompt_token_ids": RowIds(ids[:start], rows, ids[start + k :], held.lease),
            "cache_salt": salt(held.digest, engine_input.get("cache_salt")),
        }


def salt(digest: str, given: str | None) -> str:
    """The cache salt made from the tokens' digests and the client's own `cache_salt`."""
    return hashlib.sha256(f"{digest}\n{given or ''}".encode()).hexdigest()
