"""Where the vectors start. For one vector on a small model the start decides more than the training.

A mean of the prompt's embeddings begins far above KL(none) and is driven into a
vector that the model ignores; a real token of the prompt begins below it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from be_serve.core.artifact import Placement, Token, write_atomically
from be_serve.core.digests import digest_of
from be_serve.core.errors import InputError
from trainer.config import TrainConfig
from trainer.data.teacher import Example
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress
from trainer.model.soft_token import Row, scored_states
from trainer.optim.losses import Head
from trainer.optim.objectives import student_row

_SCREEN_QUERIES, SCREEN_TOKENS = 2, 16
SCORE_TOKENS = 32
_FINALISTS = 24
_POOL = 128
_WINDOWS = 48
_WORDS = 600  # distinct tokens that are screened: a prompt of 5,000 has thousands, and each costs two passes
_ROWS = 32
_DESCRIPTION_TOKENS = 40
_DESCRIBE = (
    "These are the instructions of an assistant:\n\n{prompt}\n\n"
    "Say in one short sentence who the assistant is and how it answers. Begin with 'You are'."
)


@dataclass(frozen=True)
class Start:
    """The first learned vectors [K, H] and, where they are real tokens, their text and KL on the search queries."""

    vectors_KH: Tensor
    text: str | None = None
    kl: float | None = None
    literal: tuple[int, ...] = ()
    """Token ids of the literal places, which stand before the learned vectors."""


def random_start(model: FrozenModel, k: int, seed: int) -> Start:
    """Gaussian rows with the mean and spread of the embedding matrix (the paper's initialisation)."""
    rng = torch.Generator().manual_seed(seed)
    weight_VH = model.embed(torch.arange(min(model.vocab_size, 20_000))).float().cpu()
    return Start(weight_VH.mean(0) + weight_VH.std() * torch.randn(k, model.hidden_size, generator=rng))


def mean_start(model: FrozenModel, k: int, prompt_ids: Sequence[int]) -> Start:
    """The means of k equal parts of the prompt's embeddings."""
    rows_PH = model.embed(prompt_ids).float()
    return Start(torch.stack([part.mean(0) for part in _parts(rows_PH, k)]))


def text_start(model: FrozenModel, k: int, text: str) -> Start:
    """The embeddings of a text's tokens; a longer text's are averaged in k parts. Raises InputError if shorter."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < k:
        raise InputError(f"--init text:... has {len(ids)} tokens, fewer than --tokens {k}; give a longer text.")
    rows = model.embed(ids).float()
    vectors = rows if len(ids) == k else torch.stack([part.mean(0) for part in _parts(rows, k)])
    return Start(vectors, text)


def written_texts(model: FrozenModel, prompt: str, count: int = 8, seed: int = 0) -> list[list[int]]:
    """Short descriptions of the prompt by the model itself, as ids: rivals for `Search.run`.

    None for a prompt so long that the model could not read it with the question.
    """
    messages = [{"role": "user", "content": _DESCRIBE.format(prompt=prompt)}]
    chat = model.slots.encode_chat(messages, template_kwargs=model.template_kwargs)
    if len(chat) + _DESCRIPTION_TOKENS > model.max_length:
        return []
    prefix = Prefix(model, model.embed(chat[:-1]))
    made = prefix.generate([chat[-1:]] * count, _DESCRIPTION_TOKENS, temperature=0.7, seed=seed)
    texts = {model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in made}
    return [model.tokenizer.encode(text, add_special_tokens=False) for text in sorted(texts) if text]


def found_start(model: FrozenModel, ids: Sequence[int], kl: float) -> Start:
    """The embeddings of tokens that a search found."""
    return Start(model.embed(ids).float(), model.tokenizer.decode(ids), kl)


def file_start(model: FrozenModel, k: int, paths: str) -> Start:
    """The vectors of an earlier token of the same model, or of several in order (`a,b`): tokens put together.

    Raises InputError, WrongModel.
    """
    tokens = [Token.load(path) for path in paths.split(",")]
    for token in tokens:
        token.check_model(model.fingerprint, model.hidden_size, served=model.name)
    found = sum(token.manifest.k for token in tokens)
    if found != k:
        raise InputError(f"--init file:{paths} holds {found} vectors; give --tokens {found}.")
    return Start(torch.cat([torch.from_numpy(token.vectors.copy()) for token in tokens]))


def _parts(rows_PH: Tensor, k: int) -> list[Tensor]:
    if len(rows_PH) < k:
        raise InputError(f"The prompt has {len(rows_PH)} tokens, fewer than --tokens {k}.")
    return list(rows_PH.tensor_split(k))


def search_size(words: int, k: int, queries: int, texts: int = 0) -> tuple[int, int]:
    """How many forward rows `Search.run` needs: those that screen a candidate, and those that score one."""

    def best(candidates: int, finalists: int) -> tuple[int, int]:
        screened = candidates * min(queries, _SCREEN_QUERIES) if candidates > finalists else 0
        return screened, min(candidates, finalists) * queries

    tried = max(_POOL // k, 8)
    rounds = [best(min(words, _WORDS), _FINALISTS), *[best(min(words, tried), tried // 4)] * (k - 1)]
    if k > 1:
        rounds.append(best(_WINDOWS + texts, _FINALISTS // 3))
    return sum(screened for screened, _ in rounds), sum(scored for _, scored in rounds)


class Search:
    """Greedy search over a prompt's own tokens by KL(full || candidate) on a few training queries.

    One token at a time: all distinct tokens of the prompt are screened on two
    queries, the best are scored on all. For k > 1 each further position tries the
    best tokens behind those already chosen, the fewer the larger k is, and texts of k
    tokens compete with the result: runs of the prompt, and those given to `run`.
    """

    def __init__(
        self,
        model: FrozenModel,
        examples: Sequence[Example],
        placement: Placement,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        self.progress = progress
        self._cases = [_Case(model, example, placement) for example in examples]

    def run(self, prompt_ids: Sequence[int], k: int, texts: Sequence[Sequence[int]] = ()) -> tuple[list[int], float]:
        """The best k tokens found, and their KL; of `texts` (ids) the first k tokens compete."""
        pool = self._words(prompt_ids)
        ranked = self._best([[token] for token in pool], _FINALISTS)
        chosen, kl = ranked[0]
        tokens = [ids[0] for ids, _ in ranked]
        tokens += [token for token in pool if token not in set(tokens)]
        tried = max(_POOL // k, 8)  # a search for 16 tokens may not take four times as long as one for 4
        for _ in range(1, k):
            chosen, kl = self._best([[*chosen, token] for token in tokens[:tried]], tried // 4)[0]
        found = [(chosen, kl)]
        if k > 1:
            rivals = self._windows(prompt_ids, k, set(tokens[:_FINALISTS]))
            rivals += [list(text[:k]) for text in texts if len(text) >= k]
            found += self._best(rivals, _FINALISTS // 3)
        return min(found, key=lambda candidate: candidate[1])

    def _words(self, prompt_ids: Sequence[int]) -> list[int]:
        """Distinct tokens with a letter or digit, in order of appearance; of many, some from all over the prompt."""
        decode = self.model.tokenizer.decode
        seen = dict.fromkeys(prompt_ids)
        words = [token for token in seen if any(c.isalnum() for c in decode([token]))] or list(seen)
        return [words[n * len(words) // _WORDS] for n in range(_WORDS)] if len(words) > _WORDS else words

    def _windows(self, prompt_ids: Sequence[int], k: int, good: set[int]) -> list[list[int]]:
        """Runs of k tokens: the first, and those with most of the good tokens."""
        if len(prompt_ids) < k:
            raise InputError(f"The prompt has {len(prompt_ids)} tokens, fewer than --tokens {k}.")
        runs = [list(prompt_ids[i : i + k]) for i in range(len(prompt_ids) - k + 1)]
        ranked = sorted(range(len(runs)), key=lambda i: (-len(good & set(runs[i])), i))
        return [runs[i] for i in dict.fromkeys([0, *ranked[: _WINDOWS - 1]])]

    def _best(self, candidates: list[list[int]], finalists: int) -> list[tuple[list[int], float]]:
        """Candidates with their KL, best first; all are screened, the best few scored on every query."""
        if len(candidates) > finalists:
            screened = self._score(candidates, self._cases[:_SCREEN_QUERIES], SCREEN_TOKENS)
            order = sorted(range(len(candidates)), key=screened.__getitem__)[:finalists]
            candidates = [candidates[i] for i in order]
        scores = self._score(candidates, self._cases, SCORE_TOKENS)
        order = sorted(range(len(candidates)), key=scores.__getitem__)
        return [(candidates[i], scores[i]) for i in order]

    def _score(self, candidates: list[list[int]], cases: Sequence[_Case], tokens: int) -> list[float]:
        """Mean KL of each candidate over the first `tokens` response tokens of the cases."""
        with torch.no_grad():
            vectors_CKH = self.model.embed(candidates)
            total, count = torch.zeros(len(candidates)), 0
            for case in cases:
                sums = [case.kl(part, tokens) for part in vectors_CKH.split(_ROWS)]
                total += torch.cat(sums).cpu()
                count += min(tokens, len(case.row.response))
                if self.progress:
                    self.progress(len(candidates))
            return [float(value) for value in total / count]


class _Case:
    """One query on which candidates are compared."""

    def __init__(self, model: FrozenModel, example: Example, placement: Placement) -> None:
        self.model = model
        self.row = student_row(model, example.query, example.response, placement)
        self.states_TH = example.states_TH

    def kl(self, vectors_CKH: Tensor, tokens: int) -> Tensor:
        """Summed KL [C] over the first `tokens` response tokens for each candidate."""
        response = self.row.response[:tokens]
        row = Row(self.row.before, self.row.after, response)
        head: Head = self.model.head
        teacher_TV = head(self.states_TH[: len(response)].to(self.model.device)).float().log_softmax(-1)
        states = scored_states(self.model, [row] * len(vectors_CKH), vectors_CKH)
        sums = []
        # A few candidates at a time: their logits are C x T x V numbers.
        for part_NH in states.split(len(response) * max(1, math.ceil(256 / len(response)))):
            logits = head(part_NH).float().reshape(-1, *teacher_TV.shape)
            kl_CT = (teacher_TV.exp() * (teacher_TV - logits.log_softmax(-1))).sum(-1)
            sums.append(kl_CT.sum(1))
        return torch.cat(sums)


def no_start(model: FrozenModel) -> Start:
    """No learned vectors [0, H]."""
    return Start(torch.zeros(0, model.hidden_size, device=model.device), None, None)


def find_start(
    config: TrainConfig,
    model: FrozenModel,
    prompt: str,
    prompt_ids: Sequence[int],
    examples: Sequence[Example],
    *,
    cache: Path,
    progress: Progress,
) -> Start:
    """The start that `init` names, or the best that a search finds on the first `search_queries` examples.

    What was found is kept in `cache`, for runs that differ elsewhere. Raises InputError.
    """
    if config.init == "random":
        return random_start(model, config.learned, config.seed)
    if config.init == "mean":
        return mean_start(model, config.learned, prompt_ids)
    if config.init.startswith("file:"):
        return file_start(model, config.learned, config.init.removeprefix("file:"))
    if config.init.startswith("text:"):
        return text_start(model, config.learned, config.init.removeprefix("text:"))
    searched = examples[: config.search_queries]
    cases = [[example.query.chat_json(), example.response] for example in searched]
    key = [prompt, config.placement, config.learned, config.summary, str(model.fingerprint), str(model.dtype)]
    kept = cache / f"start-{digest_of([*key, cases])}.json"
    if kept.exists():
        return found_start(model, **json.loads(kept.read_text(encoding="utf-8")))
    texts = [] if config.learned == 1 else written_texts(model, prompt, seed=config.seed)
    if config.summary:
        texts.append(model.slots.prompt_ids(config.summary, template_kwargs=model.template_kwargs))
    ids, kl = Search(model, searched, config.placement, progress).run(prompt_ids, config.learned, texts)
    write_atomically(kept, json.dumps({"ids": ids, "kl": kl}).encode())
    return found_start(model, ids, kl)
