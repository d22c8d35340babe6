"""Literal places: places of a token that begin as the embeddings of words, chosen from the prompt by divergence.

A few learned vectors carry a prompt's manner. Its names and numbers hardly enter them: what is left of the
divergence stands on the words of the answers that the prompt itself holds. So a token begins at these words, or
keeps them beside the vectors. Words that are trained are ranked by this divergence and by how little the model
expects them (`rank_words`). Words that stay are kept as phrases, runs of the prompt's tokens up to a comma, colon,
full stop or line break, ranked by the divergence that the vectors leave on their words, for each place (`rank`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from be_serve.core.artifact import Placement
from be_serve.core.errors import InputError
from be_serve.core.redaction import hide
from trainer.config import MAX_PLACES
from trainer.data.teacher import Example
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress
from trainer.model.soft_token import Row, scored_states
from trainer.optim.losses import Head, hidden_kl, hidden_reconstruction, kl_divergence
from trainer.optim.objectives import student_row
from trainer.text import CONTENT, content_words, sentences, without_marks

_PIECE = re.compile(r"(?:(?!(?<=[.,;:!?)\]\"”])\s|\n|\s[(\[\"“]).)+", re.DOTALL)
"""Text up to a mark that white space follows, a line break, or an opening bracket or quotation mark."""
_LONGEST = 12
"""Words of a phrase, and tokens of a word; longer ones are cut, a word in parts of `_PART` tokens."""
_PART = 4
# Ten characters of letters and digits mixed: a key, and the model expects it least of all words.
_KEY = re.compile(r"(?=[\w-]*\d)(?=[\w-]*[A-Za-z])[A-Za-z0-9_-]{10,}")
_SPACED = re.compile(r"\S+")
CASES, SCORED, _FED = 16, 32, 16
"""Examples on which texts are measured, response tokens that count, and texts in one forward pass."""
_UNVOTED = 0.1
"""What a word without votes has in place of their square root."""
_BEARS = 0.5
"""Nats from which on the prompt bears on a word."""


@dataclass(frozen=True)
class Phrase:
    """A run of the prompt: its text, its token ids and where it begins (in characters)."""

    text: str
    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Literal:
    """The chosen words: ids in the prompt's order, and the divergence without and with them (nats a token)."""

    ids: tuple[int, ...]
    kl_without: float
    kl_with: float


def phrases(model: FrozenModel, prompt: str) -> list[Phrase]:
    """The prompt's phrases in order. A phrase that occurs twice is listed once."""
    found: dict[str, Phrase] = {}
    for piece in _PIECE.finditer(prompt):
        words = list(_SPACED.finditer(piece.group()))
        for part in (words[n : n + _LONGEST] for n in range(0, len(words), _LONGEST)):
            text = piece.group()[part[0].start() : part[-1].end()]
            if any(c.isalnum() for c in text) and text not in found:
                ids = model.tokenizer.encode(f" {text}", add_special_tokens=False)
                found[text] = Phrase(text, tuple(ids), piece.start() + part[0].start())
    return list(found.values())


def words(model: FrozenModel, prompt: str) -> list[Phrase]:
    """The prompt's words in order, without the marks at their edges; what looks like a key is left out."""
    found = []
    for piece in _SPACED.finditer(prompt):
        text = without_marks(piece.group())
        if text and hide(text) == text and not _KEY.search(text):
            ids = model.tokenizer.encode(f" {text}", add_special_tokens=False)
            # What is so long is a text without spaces, or a link: its parts compete.
            parts = [ids] if len(ids) <= _LONGEST else [ids[n : n + _PART] for n in range(0, len(ids), _PART)]
            for n, part in enumerate(parts):
                word = text if len(parts) == 1 else str(model.tokenizer.decode(part)).strip()
                found.append(Phrase(word, tuple(part), piece.start() + n))
    return found


def surprise(model: FrozenModel, found: Sequence[Phrase]) -> list[float]:
    """How little the model expects each word behind those before it, nats a token."""
    ids = [token for word in found for token in word.ids]
    with torch.no_grad():
        states_PH = model.body(model.embed(ids)[None])[0, :-1]
        nll_P = hidden_reconstruction(states_PH, torch.tensor(ids[1:], device=model.device), model.head)
    first_1 = nll_P.mean()[None] if len(nll_P) else nll_P.new_zeros(1)  # nothing tells it: it counts as the mean does
    return [float(part.mean()) for part in torch.cat([first_1, nll_P]).split([len(word.ids) for word in found])]


def rank_words(found: Sequence[Phrase], votes: dict[str, float], nats: Sequence[float]) -> list[Phrase]:
    """Words for places that are trained, best first: by their votes, and by how little the model expects them (nats).

    Training makes sentences of them again, so single words do, and more of them fit than phrases. A word that occurs
    twice has its votes once.
    """
    left, worth = dict(votes), []
    for word, surprised in zip(found, nats, strict=True):
        own = sum(left.pop(name, 0.0) for name in content_words(word.text))
        worth.append((math.sqrt(own) + _UNVOTED) * math.sqrt(max(surprised, 0.0)))
    return [found[i] for i in sorted(range(len(found)), key=lambda i: -worth[i])]


def votes(model: FrozenModel, prompt: str, examples: Sequence[Example], kl: Sequence[Tensor]) -> list[dict[str, float]]:
    """For each example the divergence (nats) on the words of its answer that the prompt holds, by lower-case word.

    `kl` holds the divergence [T] of each example's response tokens. A word counts where its tokens together differ by
    `_BEARS` nats or more: elsewhere it is said without the prompt, too.
    """
    held = content_words(prompt)
    everything = []
    decode = model.tokenizer.decode
    for example, kl_T in zip(examples, kl, strict=True):
        found: dict[str, float] = defaultdict(float)
        ends: list[int] = []
        for end in range(1, len(example.response) + 1):
            ends.append(len(decode(example.response[:end])))
        text = decode(example.response)
        begins = [0, *ends[:-1]]
        for word in CONTENT.finditer(text):
            if (name := word.group().lower()) in held:
                inside = [
                    i for i, (a, b) in enumerate(zip(begins, ends, strict=True)) if a < word.end() and b > word.start()
                ]
                word_kl = float(sum(kl_T[i] for i in inside))
                if word_kl >= _BEARS:
                    found[name] += word_kl
        everything.append(dict(found))
    return everything


def queries_by_sentence(prompt: str, found: Sequence[dict[str, float]]) -> list[tuple[str, int]]:
    """For each sentence of the prompt, on how many examples it bears: these say a word that it alone holds.

    `found` are the votes. A sentence without a word of its own is left out.
    """
    parts = list(dict.fromkeys(sentences(prompt)))
    words = [content_words(part) for part in parts]
    own = [mine - set().union(*words[:n], *words[n + 1 :]) for n, mine in enumerate(words)]
    return [
        (part, sum(not mine.isdisjoint(said) for said in found)) for part, mine in zip(parts, own, strict=True) if mine
    ]


def rank(found: Sequence[Phrase], votes: dict[str, float]) -> list[Phrase]:
    """Phrases by the votes of their words a place, best first; a word counts for the first phrase that has it."""
    left, pool, order = dict(votes), list(found), []
    while pool:
        worth = [sum(left.get(w, 0.0) for w in content_words(p.text)) / len(p.ids) for p in pool]
        best = max(range(len(pool)), key=worth.__getitem__)
        if worth[best] <= 0:
            break
        order.append(pool.pop(best))
        for word in content_words(order[-1].text):
            left.pop(word, None)
    return order


def fill(ranked: Sequence[Phrase], places: int) -> tuple[int, ...]:
    """Ids of the best phrases that fit so many places, in the prompt's order."""
    chosen: list[Phrase] = []
    for phrase in ranked:
        if len(phrase.ids) <= places - sum(len(p.ids) for p in chosen):
            chosen.append(phrase)
    return tuple(token for phrase in sorted(chosen, key=lambda p: p.begin) for token in phrase.ids)


def kept_words(model: FrozenModel, text: str, places: int) -> tuple[int, ...]:
    """The ids of a text for the literal places. Raises InputError where it is empty or too long."""
    ids = tuple(model.tokenizer.encode(text, add_special_tokens=False))
    if not 0 < len(ids) <= places:
        raise InputError(
            f"--keep-text has {len(ids)} tokens, and {places} literal places are free. Use a shorter text, or more "
            f"--places (at most {MAX_PLACES})."
        )
    return ids


class Residue:
    """What learned vectors [K, H] leave of the divergence on examples, and what words before them take off it.

    K may be 0: what the model does without a prompt.
    """

    def __init__(
        self,
        model: FrozenModel,
        prompt: str,
        examples: Sequence[Example],
        learned_KH: Tensor,
        placement: Placement,
        progress: Progress | None = None,
    ) -> None:
        """`progress` is called with the number of answers scored."""
        self.model = model
        self.learned_KH = learned_KH.to(model.device, model.dtype)
        self.progress = progress
        self.examples = examples
        self.rows = [student_row(model, e.query, e.response, placement) for e in examples]
        self.kl = self._kl()
        self.said = votes(model, prompt, examples, self.kl)
        """The votes of each example."""
        self.votes: dict[str, float] = defaultdict(float)
        """Their sums by word."""
        for said in self.said:
            for word, kl in said.items():
                self.votes[word] += kl

    def _kl(self) -> list[Tensor]:
        """The divergence [T] of each example under the learned vectors alone."""
        with torch.no_grad():
            before = self.rows[0].before
            rows_PH = torch.cat([self.model.embed(before), self.learned_KH]) if before else self.learned_KH
            own = [Row((), row.after, row.response) for row in self.rows]
            states = Prefix(self.model, rows_PH).states(own, self.progress)
            head: Head = self.model.head
            return [
                hidden_kl(e.states_TH.to(self.model.device), state, head).cpu()
                for e, state in zip(self.examples, states, strict=True)
            ]

    def cases(self, ranked: Sequence[Phrase], count: int) -> list[int]:
        """Examples to measure on: for each phrase in turn the one whose words it would mend most; no example twice."""
        texts = [self.model.tokenizer.decode(e.response).lower() for e in self.examples]
        total = [float(kl_T.sum()) for kl_T in self.kl]
        chosen: list[int] = []
        for phrase in [*ranked, None]:
            if len(chosen) >= count:
                break
            words = content_words(phrase.text) if phrase else set()
            said = [sum(self.votes.get(w, 0.0) > 0 and w in text for w in words) for text in texts]
            order = sorted(range(len(texts)), key=lambda i: (-said[i], -total[i]))
            chosen += [i for i in order if i not in chosen][: 1 if phrase else count - len(chosen)]
        return chosen

    def divergence(self, texts: Sequence[Sequence[int]], cases: Sequence[int]) -> list[float]:
        """Mean divergence (nats a token) on the first tokens of the cases, with each text before the vectors."""
        sums, count = torch.zeros(len(texts)), 0
        with torch.no_grad():
            vectors = [
                torch.cat([self.model.embed(list(ids)), self.learned_KH]) if ids else self.learned_KH for ids in texts
            ]
            for case in cases:
                row, states_TH = self.rows[case], self.examples[case].states_TH
                response = row.response[:SCORED]
                short = Row(row.before, row.after, response)
                head: Head = self.model.head
                teacher_TV = head(states_TH[: len(response)].to(self.model.device))
                for at in range(0, len(texts), _FED):
                    part = vectors[at : at + _FED]
                    states_NH = scored_states(self.model, [short] * len(part), part)
                    for n, own_TH in enumerate(states_NH.split(len(response))):
                        sums[at + n] += float(kl_divergence(teacher_TV, head(own_TH)).sum())
                count += len(response)
                if self.progress:
                    self.progress(len(texts))
        return [float(value) for value in sums / max(count, 1)]


def find_literal(residue: Residue, prompt: str, places: int, *, trained: bool) -> Literal:
    """The words of the prompt for `places` literal places, beside the learned vectors of `residue`.

    They are the best phrases that fit, or the best words where the places are `trained`. The divergence of a few
    answers decides only whether they stay beside learned vectors: with it, the prompt's beginning won against phrases
    that said twice as many facts.
    """
    model = residue.model
    if trained:
        found = words(model, prompt)
        ranked = rank_words(found, residue.votes, surprise(model, found))
    else:
        ranked = rank(phrases(model, prompt), residue.votes)
    chosen = fill(ranked, places)
    without, kept = residue.divergence([(), chosen], residue.cases(ranked, CASES))
    taken = kept < without or not len(residue.learned_KH)
    return Literal(chosen, without, kept) if taken else Literal((), without, without)
