"""What stands in the prompt's place, and how far each is from the full prompt: KL(full || arm), token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from be_serve.core.errors import InputError
from be_serve.core.slots import Message
from trainer.data.queries import Query
from trainer.data.teacher import Example
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress, common_prefix
from trainer.model.soft_token import Row
from trainer.optim.losses import CACHED_ROWS

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


@dataclass(frozen=True)
class Scores:
    """Figures [N] of one arm for each response token of the full prompt's answers."""

    kl_N: Tensor
    top1_N: Tensor
    nll_N: Tensor

    def of(self, chosen: Sequence[int], lengths: Sequence[int]) -> Scores:
        """The figures of the chosen answers alone; `lengths` are all answers'."""

        def pick(values_N: Tensor) -> Tensor:
            parts = values_N.split(list(lengths))
            return torch.cat([parts[i] for i in chosen])

        return Scores(pick(self.kl_N), pick(self.top1_N), pick(self.nll_N))

    def means(self, lengths: Tensor) -> dict[str, float]:
        """Means over all tokens, and over the first token of each answer; `lengths` [Q] are the answers'."""
        firsts = lengths.cumsum(0) - lengths
        return {
            "kl": float(self.kl_N.mean()),
            "top1": float(self.top1_N.mean()),
            "first_token_kl": float(self.kl_N[firsts].mean()),
            "nll": float(self.nll_N.mean()),
        }


def chats(model: FrozenModel, queries: Sequence[Query], system: str | None) -> list[list[int]]:
    chats = []
    for query in queries:
        messages: list[Message] = [*query.messages]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        chats.append(model.slots.encode_chat(messages, template_kwargs=model.template_kwargs))
    return chats


def score_arms(
    model: FrozenModel, reference: Sequence[Example], arms: dict[str, Arm], progress: Progress | None = None
) -> dict[str, Scores]:
    """Figures of each arm, and of `full`, on the full prompt's answers."""
    states = {"full": [e.states_TH for e in reference]}
    for name, arm in arms.items():
        rows = [Row((), suffix, e.response) for suffix, e in zip(arm.suffixes, reference, strict=True)]
        states[name] = arm.prefix.states(rows, progress)
    return score(model, reference, states)


def score(model: FrozenModel, reference: Sequence[Example], states: dict[str, list[Tensor]]) -> dict[str, Scores]:
    """Each arm's figures a token, from float32 logits; `states` holds the arm `full`."""
    flat = {name: torch.cat(found) for name, found in states.items()}
    targets_N = torch.tensor([t for e in reference for t in e.response], device=model.device)
    found: dict[str, list[Tensor]] = {name: [] for name in states}
    with torch.no_grad(), model.exact_head():
        for at in torch.arange(len(targets_N)).split(_CHUNK):
            full_nV = model.head(flat["full"][at].to(model.device).float())
            for name, arm_NH in flat.items():
                # One arm at a time: an arm's logits are as large as all else together.
                arm_nV = full_nV if name == "full" else model.head(arm_NH[at].to(model.device).float())
                found[name].append(_figures(full_nV, arm_nV, targets_N[at]).cpu())
    return {name: Scores(*torch.cat(parts, dim=1)) for name, parts in found.items()}


def _figures(full_nV: Tensor, arm_nV: Tensor, targets_n: Tensor) -> Tensor:
    """KL, agreement of the likeliest token, and negative log-likelihood [3, n], of logits in float32."""
    rows = CACHED_ROWS if full_nV.device.type == "cpu" else max(len(full_nV), 1)
    found = []
    for full, arm, targets in zip(full_nV.split(rows), arm_nV.split(rows), targets_n.split(rows), strict=True):
        log_p, log_q = full.log_softmax(-1), arm.log_softmax(-1)
        agrees = (log_p.argmax(-1) == log_q.argmax(-1)).float()
        nll = -log_q.gather(1, targets[:, None])[:, 0]
        kl = (log_p.exp() * log_p.sub_(log_q)).sum(-1)
        found.append(torch.stack([kl, agrees, nll]))
    return torch.cat(found, 1)


def rho_interval(be_N: Tensor, none_N: Tensor, lengths_Q: Tensor, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of rho, from `draws` resamples of the queries."""
    sums = [torch.stack([part.sum() for part in kl_N.split(lengths_Q.tolist())]) for kl_N in (be_N, none_N)]
    drawn = torch.randint(len(lengths_Q), (draws, len(lengths_Q)), generator=torch.Generator().manual_seed(0))
    ratios = sums[0][drawn].sum(1) / sums[1][drawn].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975])).tolist()
    return low, high
