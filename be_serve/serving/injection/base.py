"""The seam between the hook and the ways in which vectors reach the engine.

prompt_embeds  they travel with each request, as vLLM prompt embeds
resident_rows  they lie on the workers; a request names their rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from be_serve.core.slots import Slot

INJECTIONS = ("resident-rows", "prompt-embeds")


class Held(Protocol):
    """What one request with a token holds in this server process."""

    def release(self) -> None:
        """Give it back; called when the HTTP request is over, and harmless when called again."""
        ...


class Injection(Protocol):
    """One way. `name` is its value of `--be-injection`."""

    name: str

    @property
    def capacity(self) -> int | None:
        """Most vectors that one request may hold in this server process; None: any number."""
        ...

    beside_media: bool
    """Whether vectors can stand in one prompt with images, audio or video."""
    outlasts_request: bool
    """Whether what a request holds is kept where its answer is generated when the HTTP request is over."""

    def check(self, messages: Any, tools: Any) -> None:
        """Raise UnsupportedRequest for content that this way must not let through. Sees every chat request."""
        ...

    async def hold(self, parts: Sequence[tuple[str, Any]], *, wait: bool = True, choices: int = 1) -> Held:
        """Take what a request needs whose slot holds these tokens: each a digest and its vectors [k, hidden_size].

        `choices` are the answers it asks for (`n`).
        Raises BEError where there is not enough of it: after a while, without `wait` at once.
        """
        ...

    def inject(self, engine_input: dict[str, Any], slot: Slot, held: Any) -> dict[str, Any]:
        """The engine input whose slot of placeholders stands for the vectors. Raises BEError."""
        ...
