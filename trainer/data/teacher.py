"""The teacher: the same model under the full prompt. Its responses and final hidden states are made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import InputError
from trainer.data.queries import Query
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Prefix, Progress, common_prefix
from trainer.model.soft_token import Row
from trainer.text import recites

_SHARD = 64


@dataclass(frozen=True)
class Example:
    """A query, a response to it, and the teacher's final hidden states [T, H] that predict its ids."""

    query: Query
    response: list[int]
    states_TH: Tensor


class Decoder(Protocol):
    """Something that decodes under the same weights faster than `Prefix.generate`."""

    name: str

    def __call__(
        self, chats: Sequence[Sequence[int]], max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Response ids to each chat (ids). Raises InputError where it fails."""
        ...

    def close(self) -> None:
        """Give back its memory, which is wanted for training."""
        ...


class Teacher:
    """Responds to queries under the full prompt and says what it expected at each response id.

    A response ends with the first of the `stop` texts, as it would for a client that
    sends them. Results are written to `folder` in shards keyed by everything they
    depend on, so an interrupted run continues where it stopped.
    """

    def __init__(
        self,
        model: FrozenModel,
        prompt: str,
        folder: Path | None = None,
        *,
        stop: Sequence[str] = (),
        decoder: Decoder | None = None,
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.folder = folder
        self.stop = tuple(stop)
        self.decoder = decoder

    def text(self, response: Sequence[int]) -> str:
        """A response as a client sees it: without special tokens, and without the stop text."""
        found = str(self.model.tokenizer.decode(response, skip_special_tokens=True))
        for stop in self.stop:
            found = found.split(stop)[0]
        return found.strip()

    def cut(self, response: list[int]) -> list[int]:
        """A response up to the id with which the first stop text is complete, that id included."""
        decode = self.model.tokenizer.decode
        if not any(text in decode(response) for text in self.stop):
            return response
        for end in range(1, len(response)):
            if any(text in decode(response[:end]) for text in self.stop):
                return response[:end]
        return response

    def ended(self, response: Sequence[int]) -> bool:
        """Whether a response came to its end: the end of the turn, or a stop text."""
        if not response:
            return False
        if response[-1] in self.model.stop_ids():
            return True
        return bool(self.stop) and any(text in self.model.tokenizer.decode(response) for text in self.stop)

    def chat_ids(self, query: Query) -> list[int]:
        """Ids of the chat under the full prompt, up to where the response begins."""
        system = {"role": "system", "content": self.prompt}
        return self.model.slots.encode_chat([system, *query.messages], template_kwargs=self.model.template_kwargs)

    def examples(
        self,
        queries: Sequence[Query],
        *,
        response_tokens: int,
        temperature: float = 0.0,
        gold: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[Example]:
        """An example for each query; `gold` takes the queries' answers in place of the teacher's responses.

        `progress` is called with the number of queries done. Raises InputError where a
        query is too long for the model or lacks its gold answer.
        """
        seed = seed if temperature else 0  # greedy responses are the same for all seeds
        settings = [response_tokens, temperature, gold, seed, *([self.decoder.name] if self.decoder else [])]
        found: list[Example] = []
        for start in range(0, len(queries), _SHARD):
            shard = list(queries[start : start + _SHARD])
            file = self._file(shard, settings)
            loaded = _read_shard(file, shard) if file else None
            if loaded is None:
                loaded = self._make(shard, response_tokens, temperature, gold, seed + start, progress)
                if file:
                    _write_shard(file, loaded)
            elif progress:
                progress(2 * len(shard))
            found.extend(loaded)
        return found

    def recites(self, example: Example) -> bool:
        """Whether a response recites the prompt itself: no behaviour that anybody wants kept."""
        return recites(self.text(example.response), self.prompt)

    def _make(
        self,
        queries: Sequence[Query],
        response_tokens: int,
        temperature: float,
        gold: bool,
        seed: int,
        progress: Progress | None,
    ) -> list[Example]:
        chats = [self.chat_ids(query) for query in queries]
        for chat, query in zip(chats, queries, strict=True):
            if len(chat) + response_tokens > self.model.max_length:
                raise InputError(
                    f"A query of {len(chat)} tokens with its prompt leaves no room for {response_tokens} response "
                    f"tokens in the model's {self.model.max_length}: {query.text[:60]!r}."
                )
        shared = common_prefix(chats)
        prefix = Prefix(self.model, self.model.embed(chats[0][:shared]))
        suffixes = [chat[shared:] for chat in chats]
        if gold:
            responses = [self._gold_ids(query, response_tokens) for query in queries]
            if progress:
                progress(len(queries))
        elif self.decoder:
            responses = [self.cut(made) for made in self.decoder(chats, response_tokens, temperature, seed)]
            if progress:
                progress(len(queries))
        else:
            responses = prefix.generate(
                suffixes, response_tokens, temperature=temperature, seed=seed, progress=progress
            )
            responses = [self.cut(response) for response in responses]
        for query, response in zip(queries, responses, strict=True):
            if not response:
                raise InputError(
                    f"There is no response to this query within {response_tokens} tokens: {query.text[:60]!r}. "
                    "Leave it out, or raise --response-tokens."
                )
        rows = [Row((), suffix, response) for suffix, response in zip(suffixes, responses, strict=True)]
        states = prefix.states(rows, progress)
        # In the model's own dtype: in bfloat16 5 KB a token at width 2560.
        return [
            Example(query, response, state.to("cpu"))
            for query, response, state in zip(queries, responses, states, strict=True)
        ]

    def _gold_ids(self, query: Query, limit: int) -> list[int]:
        if query.answer is None:
            raise InputError(f"Gold answers were asked for, but this query has none: {query.text[:60]!r}.")
        ids = self.model.tokenizer.encode(query.answer, add_special_tokens=False)
        return (ids if query.cut else [*ids, self.model.stop_ids()[-1]])[:limit]

    def _file(self, queries: Sequence[Query], settings: Sequence[object]) -> Path | None:
        if self.folder is None:
            return None
        key = {
            "model": str(self.model.fingerprint),
            "dtype": str(self.model.dtype),
            "template": self.model.template_kwargs,
            "prompt": self.prompt,
            "stop": self.stop,
            "queries": [query.chat_json() for query in queries],
            "settings": list(settings),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / f"teacher-{digest}.safetensors"


def _write_shard(file: Path, examples: Sequence[Example]) -> None:
    tensors = {
        "states": torch.cat([e.states_TH for e in examples]),
        "responses": torch.tensor([t for e in examples for t in e.response], dtype=torch.int32),
        "lengths": torch.tensor([len(e.response) for e in examples], dtype=torch.int32),
    }
    write_atomically(file, save(tensors))


def _read_shard(file: Path, queries: Sequence[Query]) -> list[Example] | None:
    """The examples of a shard; None where there is none or it is damaged (it is made again)."""
    try:
        tensors = load_file(file)
        lengths = tensors["lengths"].tolist()
        ids = np.split(tensors["responses"].numpy(), np.cumsum(lengths)[:-1])
        states = tensors["states"].split(lengths)
        return [
            Example(query, [int(t) for t in response], state)
            for query, response, state in zip(queries, ids, states, strict=True)
        ]
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
