"""How far a token is from the prompt it replaces: KL(full || arm) on the full arm's own greedy answers.

Arms: `none` (an empty system turn), `template_default` (no system message),
`summary` (a short text in the prompt's place), `full`, `be`, and `be_serving`
(the vectors rounded to the serving dtype). rho = KL(be) / KL(none): 0 is the
full prompt, 1 is nothing learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from be_serve.core.errors import InputError
from be_serve.core.slots import Message
from trainer.generate import Prefix, Progress, common_prefix
from trainer.model import DTYPES, FrozenModel
from trainer.queries import Query
from trainer.soft_token import Row
from trainer.teacher import Example, Teacher

RESPONSE_TOKENS = 64
_CHUNK = 256


@dataclass(frozen=True)
class Arm:
    """What an arm puts before each response: rows shared by all queries, then ids."""

    prefix: Prefix
    suffixes: list[list[int]]

    @classmethod
    def of_ids(cls, model: FrozenModel, chats: list[list[int]]) -> Arm:
        shared = common_prefix(chats)
        return cls(Prefix(model, model.embed(chats[0][:shared])), [chat[shared:] for chat in chats])

    @classmethod
    def of_vectors(cls, model: FrozenModel, vectors_KH: Tensor, queries: Sequence[Query], placement: Placement) -> Arm:
        slots = [
            model.slots.render(q.messages, placement=placement, template_kwargs=model.template_kwargs) for q in queries
        ]
        before = slots[0].before
        if any(slot.before != before for slot in slots):
            raise InputError("The chat template prints query text before the system turn; it cannot be evaluated.")
        rows = [model.embed(before)] if before else []
        rows.append(vectors_KH.to(model.device, model.dtype))
        return cls(Prefix(model, torch.cat(rows)), [slot.after for slot in slots])


@dataclass
class Evaluation:
    """Figures of one token. `arms` maps an arm to its kl, top1, first_token_kl and nll."""

    k: int
    arms: dict[str, dict[str, float]]
    n_queries: int
    n_tokens: int
    samples: list[dict[str, str]] = field(default_factory=list)

    @property
    def rho(self) -> float:
        return self.arms["be"]["kl"] / self.arms["none"]["kl"]

    @property
    def rho_serving(self) -> float:
        return self.arms["be_serving"]["kl"] / self.arms["none"]["kl"]

    def to_json(self) -> dict[str, Any]:
        """The object of `eval --json` (CONTRACT)."""
        return {
            "k": self.k,
            "rho": self.rho,
            "rho_serving": self.rho_serving,
            "arms": self.arms,
            "n_queries": self.n_queries,
            "n_tokens": self.n_tokens,
            "samples": self.samples,
        }


def evaluate(
    teacher: Teacher,
    queries: Sequence[Query],
    vectors_KH: Tensor,
    *,
    placement: Placement = "system",
    summary: str | None = None,
    serving_dtype: str = "bfloat16",
    samples: int = 3,
    progress: Progress | None = None,
) -> Evaluation:
    """Compare the vectors [k, H] float32 with the full prompt, no prompt and the other arms.

    `progress` is called with the number of answers done.
    """
    model = teacher.model
    reference = teacher.examples(queries, response_tokens=RESPONSE_TOKENS, progress=progress)
    rounded_KH = vectors_KH.to(DTYPES[serving_dtype]).to(torch.float32)
    arms = {
        "none": Arm.of_ids(model, _chats(model, queries, "")),
        "template_default": Arm.of_ids(model, _chats(model, queries, None)),
    }
    if summary:
        arms["summary"] = Arm.of_ids(model, _chats(model, queries, summary))
    arms["be"] = Arm.of_vectors(model, vectors_KH, queries, placement)
    # A model that itself runs in the serving dtype rounds the vectors anyway: one arm, measured once.
    same = torch.equal(rounded_KH.to(model.dtype), vectors_KH.to(model.dtype))
    if not same:
        arms["be_serving"] = Arm.of_vectors(model, rounded_KH, queries, placement)

    states = {"full": [e.states_TH for e in reference]}
    for name, arm in arms.items():
        rows = [Row((), suffix, e.response) for suffix, e in zip(arm.suffixes, reference, strict=True)]
        states[name] = arm.prefix.states(rows, progress)
    figures = _compare(model, reference, states)
    if same:
        figures["be_serving"] = dict(figures["be"])
        if progress:
            progress(len(queries))
    order = [name for name in ("none", "template_default", "summary", "full", "be", "be_serving") if name in figures]
    shown = [name for name in ("none", "summary", "be") if name in arms]
    return Evaluation(
        k=len(vectors_KH),
        arms={name: figures[name] for name in order},
        n_queries=len(reference),
        n_tokens=sum(len(e.response) for e in reference),
        samples=_samples(teacher, reference[:samples], {name: arms[name] for name in shown}),
    )


def _chats(model: FrozenModel, queries: Sequence[Query], system: str | None) -> list[list[int]]:
    chats = []
    for query in queries:
        messages: list[Message] = [*query.messages]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        chats.append(model.slots.encode_chat(messages, template_kwargs=model.template_kwargs))
    return chats


def _compare(
    model: FrozenModel, reference: Sequence[Example], states: dict[str, list[Tensor]]
) -> dict[str, dict[str, float]]:
    """Each arm's means over all response tokens, from float32 logits; `states` holds the arm `full`."""
    flat = {name: torch.cat(found) for name, found in states.items()}
    targets_N = torch.tensor([t for e in reference for t in e.response], device=model.device)
    sums: dict[str, list[Tensor]] = {name: [] for name in states}
    with torch.no_grad():
        for at in torch.arange(len(targets_N)).split(_CHUNK):
            logits = {name: model.head(found_NH[at].to(model.device).float()) for name, found_NH in flat.items()}
            log_p = logits["full"].log_softmax(-1)
            for name, arm_nV in logits.items():
                log_q = arm_nV.log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                top1 = (log_p.argmax(-1) == log_q.argmax(-1)).float()
                nll = -log_q.gather(1, targets_N[at, None])[:, 0]
                sums[name].append(torch.stack([kl, top1, nll]).cpu())
    lengths = torch.tensor([len(e.response) for e in reference])
    firsts = lengths.cumsum(0) - lengths
    figures = {}
    for name, parts in sums.items():
        kl_N, top1_N, nll_N = torch.cat(parts, dim=1)
        figures[name] = {
            "kl": float(kl_N.mean()),
            "top1": float(top1_N.mean()),
            "first_token_kl": float(kl_N[firsts].mean()),
            "nll": float(nll_N.mean()),
        }
    return figures


def _samples(teacher: Teacher, reference: Sequence[Example], arms: dict[str, Arm]) -> list[dict[str, str]]:
    """Greedy answers side by side."""
    if not reference:
        return []

    def text(ids: list[int]) -> str:
        found = str(teacher.model.tokenizer.decode(ids, skip_special_tokens=True))
        for stop in teacher.stop:
            found = found.split(stop)[0]
        return found.strip()

    answers = {name: arm.prefix.generate(arm.suffixes[: len(reference)], RESPONSE_TOKENS) for name, arm in arms.items()}
    return [
        {
            "query": example.query.text,
            "full": text(example.response),
            **{name: text(made[i]) for name, made in answers.items()},
        }
        for i, example in enumerate(reference)
    ]
