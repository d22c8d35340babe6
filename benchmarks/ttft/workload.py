"""The arms of the TTFT benchmark: what each sends, where to, and what may be cached.

    none          stock    empty system turn                              cold
    floor_stock   stock    plain prompt of k tokens                       cold
    floor         plugin   plain prompt of k tokens                       cold
    be            plugin   k vectors by `be_id`                           cold
    full_warm     stock    full prompt, its prefix cached beforehand      warm
    full_cold     stock    full prompt                                    cold

"Cold" is a `cache_salt` of the request's own: vLLM's prefix cache then finds nothing.
"Warm" is one salt for all the run's requests of that case, so that the prompt's
blocks are found and a former run's are not. In a round all arms of a case ask the
same question; it is new in every round, so of a warm request the prompt alone is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from be_serve.core.errors import InputError
from benchmarks.common.prompts import Chat

ServerName = Literal["plugin", "stock"]
Content = Literal["none", "floor", "token", "full"]


@dataclass(frozen=True)
class Arm:
    """One way of asking the same question."""

    name: str
    server: ServerName
    content: Content
    label: str
    """How tables and charts name it."""
    warm: bool = False


ARMS = (
    Arm("none", "stock", "none", "no prompt"),
    Arm("floor_stock", "stock", "floor", "k-token prompt, stock"),
    Arm("floor", "plugin", "floor", "k-token prompt"),
    Arm("be", "plugin", "token", "[BE] token"),
    Arm("full_warm", "stock", "full", "full prompt, cached", warm=True),
    Arm("full_cold", "stock", "full", "full prompt, cold"),
)

CLOSE = ("floor", "be")
"""Two arms a few per cent apart and quick to ask: asked more often, to tell them apart."""

RATIOS = (("be", "full_cold"), ("be", "full_warm"), ("be", "floor"), ("floor", "floor_stock"))


@dataclass(frozen=True)
class Case:
    """A system prompt and a question length, with the texts to measure them."""

    prompt: str
    prompt_tokens: int
    """L_p of Eq. 5: tokens of the system prompt."""
    question_tokens: int
    """L_q of Eq. 5: tokens of the question."""
    template_tokens: int
    """What the chat template adds; the same in every arm."""
    floor: str
    k: int
    questions: tuple[str, ...]
    """One for each pass, those of the warm-up first."""

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}:{self.question_tokens}"

    def system_tokens(self, arm: Arm) -> int:
        """Tokens that this arm puts into the system turn."""
        return {"none": 0, "floor": self.k, "token": self.k, "full": self.prompt_tokens}[arm.content]

    def input_tokens(self, arm: Arm) -> int:
        """What the server should report as `usage.prompt_tokens`."""
        return self.template_tokens + self.system_tokens(arm) + self.question_tokens


def arms_for(plugin_only: bool, only: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms, or those named in `only`; with no stock server the plain ones run on the plugin server too.

    Raises InputError for names that are none, and where "be" is not among them.
    """
    arms: tuple[Arm, ...] = ARMS
    if plugin_only:
        arms = tuple(Arm(a.name, "plugin", a.content, a.label, a.warm) for a in ARMS if a.name != "floor_stock")
    if not only:
        return arms
    names = [arm.name for arm in arms]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"There is no arm {unknown[0]!r} here; there are {', '.join(names)}.")
    if "be" not in only:
        raise InputError("Name the arm be among the arms: the others are measured beside it.")
    return tuple(arm for arm in arms if arm.name in only)


def request_body(
    arm: Arm, case: Case, question: str, *, model: str, chat: Chat, be_id: str, salt: str, max_tokens: int
) -> dict[str, Any]:
    """The JSON body of one request of an arm."""
    prompt = {"none": None, "token": None, "floor": case.floor, "full": case.prompt}[arm.content]
    body: dict[str, Any] = {
        "model": model,
        "messages": chat.messages(prompt, question),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": max_tokens,
        # An answer that ends at once would have no content to time.
        "ignore_eos": True,
        "skip_special_tokens": False,
        "cache_salt": salt,
    }
    if chat.template_kwargs:
        body["chat_template_kwargs"] = chat.template_kwargs
    if arm.content == "token":
        body["messages"] = [{"role": "user", "content": question}]
        body["be_id"] = be_id
    elif arm.server == "plugin":
        body["be_match"] = False
    return body
