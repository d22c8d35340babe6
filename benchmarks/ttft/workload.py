"""Arms of the TTFT benchmark: server, system turn and prefix cache of each.

    none          stock    empty system turn                              cold
    floor_stock   stock    plain prompt of k tokens                       cold
    floor         plugin   plain prompt of k tokens                       cold
    be            plugin   k vectors by `be_id`                           cold
    full_warm     stock    full prompt, its prefix already cached         warm
    full_cold     stock    full prompt                                    cold

Cold: each request has its own `cache_salt`, so vLLM's prefix cache finds nothing. Warm: all
requests of the case in this run share one salt, so the cache finds the prompt, but no blocks of an
earlier run. All arms of a case ask the same question in a pass. The question is new in every pass,
so the cache of a warm request holds the prompt only.
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
    """One way to send the same question."""

    name: str
    server: ServerName
    content: Content
    label: str
    """Name in tables and charts."""
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
"""Two fast arms that differ by a few per cent. Extra passes over them narrow the interval of their ratio."""

RATIOS = (("be", "full_cold"), ("be", "full_warm"), ("be", "floor"), ("floor", "floor_stock"))


@dataclass(frozen=True)
class Case:
    """A system prompt and a question length, with all texts."""

    prompt: str
    prompt_tokens: int
    """L_p of Eq. 5: number of tokens of the system prompt."""
    question_tokens: int
    """L_q of Eq. 5: number of tokens of the question."""
    template_tokens: int
    """Number of tokens that the chat template adds, equal in every arm."""
    floor: str
    """Plain prompt of k tokens."""
    k: int
    """Number of vectors of the token."""
    questions: tuple[str, ...]
    """One question for each pass; those of the warm-up come first."""

    @property
    def name(self) -> str:
        return f"{self.prompt_tokens}:{self.question_tokens}"

    def system_tokens(self, arm: Arm) -> int:
        """Return the number of tokens that this arm puts into the system turn."""
        return {"none": 0, "floor": self.k, "token": self.k, "full": self.prompt_tokens}[arm.content]

    def input_tokens(self, arm: Arm) -> int:
        """Return the expected `usage.prompt_tokens`."""
        return self.template_tokens + self.system_tokens(arm) + self.question_tokens


def arms_for(plugin_only: bool, only: Sequence[str] = ()) -> tuple[Arm, ...]:
    """Return the arms, or those named in `only`. Without a stock server, all arms run on the plugin server.

    Raises InputError for an unknown name, and if `only` does not contain `be`.
    """
    arms: tuple[Arm, ...] = ARMS
    if plugin_only:
        arms = tuple(Arm(a.name, "plugin", a.content, a.label, a.warm) for a in ARMS if a.name != "floor_stock")
    if not only:
        return arms
    names = [arm.name for arm in arms]
    if unknown := [name for name in only if name not in names]:
        raise InputError(f"Unknown arm {unknown[0]!r}. Available arms: {', '.join(names)}.")
    if "be" not in only:
        raise InputError("Add the arm be to --arms. The benchmark compares the other arms with it.")
    return tuple(arm for arm in arms if arm.name in only)


def request_body(
    arm: Arm, case: Case, question: str, *, model: str, chat: Chat, be_id: str, salt: str, max_tokens: int
) -> dict[str, Any]:
    """Return the JSON body of one request of an arm."""
    prompt = {"none": None, "token": None, "floor": case.floor, "full": case.prompt}[arm.content]
    body: dict[str, Any] = {
        "model": model,
        "messages": chat.messages(prompt, question),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": max_tokens,
        # An answer that ends at once has no content to time.
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
