"""The interface between the hook and an injection, which brings vectors to the engine.

prompt_embeds  vectors are sent with each request, as vLLM prompt embeds
resident_rows  vectors stay on the workers; a request contains the ids of their rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from be_serve.core.slots import Slot

INJECTIONS = ("resident-rows", "prompt-embeds")


class Held(Protocol):
    """The rows or memory that one request with a token holds in this server process."""

    def release(self) -> None:
        """Release them. Called when the HTTP request ends; may be called more than once."""
        ...


class Injection(Protocol):
    """One way to bring vectors to the engine. `name` is its value of `--be-injection`."""

    name: str

    @property
    def capacity(self) -> int | None:
        """Largest number of vectors that one request may hold in this server process; None: no limit."""
        ...

    beside_media: bool
    """Whether one prompt can contain vectors and images, audio or video."""
    outlasts_request: bool
    """Whether an answer can be generated after the end of its HTTP request (background responses)."""

    def check(self, messages: Any, tools: Any) -> None:
        """Raise UnsupportedRequest for content that this injection must refuse. Called for every chat request."""
        ...

    async def hold(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True, choices: int = 1) -> Held:
        """Reserve rows or memory for a request. `parts`: digest and vectors [k, hidden_size] of each of its tokens.

        `choices` is the number of answers of the request (`n`). Raises BEError if there is not enough free:
        after a time limit, or at once without `wait`.
        """
        ...

    def inject(self, engine_input: dict[str, Any], slot: Slot, held: Any) -> dict[str, Any]:
        """The engine input with the vectors, or the ids of their rows, in the slot. Raises BEError."""
        ...
