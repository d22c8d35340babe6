"""Unlabeled queries: file readers, near-duplicates, the held-out split."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import InputError
from be_serve.core.slots import SYSTEM_ROLES, text_of

_WORD = re.compile(r"\w+", re.UNICODE)
_SIMILAR = 0.8


@dataclass(frozen=True)
class Query:
    """A chat that ends with a user turn, without a system message; `answer` is used with gold only."""

    messages: tuple[dict[str, str], ...]
    answer: str | None = None
    cut: bool = False
    """The answer was cut off at its length: no end of the turn follows it."""
    facts: tuple[str, ...] = ()
    """A right answer says one of these; the query is a probe then. They are measured on, and train nothing."""

    @property
    def text(self) -> str:
        """All turns as one text, for comparison and display."""
        return "\n".join(m["content"] for m in self.messages)

    def to_json(self) -> dict[str, Any]:
        """A JSONL row that `read_queries` reads back."""
        facts: dict[str, Any] = {"fact": self.facts[0]} if self.facts else {}
        if self.facts[1:]:
            facts["also"] = list(self.facts[1:])
        return {**self.chat_json(), **facts}

    def chat_json(self) -> dict[str, Any]:
        """The row without its facts: what is asked and answered, for digests of what a training or a teacher reads."""
        answer = {} if self.answer is None else {"answer": self.answer, **({"cut": True} if self.cut else {})}
        if len(self.messages) == 1:
            return {"query": self.messages[0]["content"], **answer}
        return {"messages": list(self.messages), **answer}


def read_queries(path: str | Path) -> list[Query]:
    """Read a JSONL file (or .jsonl.gz) of queries, one object a line:

        {"query": "..."}  or  {"question": "..."}
        {"instruction": "...", "input": "..."}          input may be absent or empty
        {"messages": [{"role": ..., "content": ...}]}   multi-turn
        {"turns": ["...", "..."]}                       FastChat's question files; the first turn is asked

    Any of them may hold `answer`, and `"fact": "..."` with `"also": ["...", ...]`: texts
    of which a right answer says one. Turns of the assistant at the end are cut off (the
    last is the answer where there is no `answer` field), a leading system turn is
    dropped: the prompt stands there. Raises InputError naming the line at fault.
    """
    path = Path(path)
    queries = []
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise InputError(f"{path}, line {number}: no JSON ({exc}).") from exc
        try:
            queries.append(parse_query(row))
        except ValueError as exc:
            raise InputError(f"{path}, line {number}: {exc}") from exc
    if not queries:
        raise InputError(f"{path} holds no queries.")
    return queries


def parse_query(row: object) -> Query:
    """One row of a query file. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object.")
    answer = row.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise ValueError("`answer` must be a string.")
    cut = row.get("cut", False)
    if not isinstance(cut, bool):
        raise ValueError("`cut` must be true or false.")
    facts = _facts(row)
    if "messages" in row:
        return replace(_from_messages(row["messages"], answer), cut=cut, facts=facts)
    for field in ("query", "question", "instruction", "turns"):
        if field in row:
            text = row[field]
            if field == "turns" and isinstance(text, list) and text:
                text = text[0]
            break
    else:
        raise ValueError("a row needs `query`, `question`, `instruction`, `turns` or `messages`.")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{field}` must be a text that is not empty.")
    extra = row.get("input") if field == "instruction" else None
    if extra is not None and not isinstance(extra, str):
        raise ValueError("`input` must be a string.")
    text = f"{text.strip()}\n\n{extra.strip()}" if extra and extra.strip() else text.strip()
    return Query(({"role": "user", "content": text},), answer, cut, facts)


def _facts(row: dict[str, Any]) -> tuple[str, ...]:
    fact, also = row.get("fact"), row.get("also")
    if fact is not None and (not isinstance(fact, str) or not fact.strip()):
        raise ValueError("`fact` must be a text that is not empty: what a right answer says.")
    if also is None:
        also = []
    if not isinstance(also, list) or any(not isinstance(text, str) or not text.strip() for text in also):
        raise ValueError("`also` must be a list of texts that are not empty: other ways to say `fact`.")
    if also and fact is None:
        raise ValueError("`also` needs a `fact` beside it.")
    return tuple(dict.fromkeys(text.strip() for text in ([] if fact is None else [fact, *also])))


def _from_messages(messages: object, answer: str | None) -> Query:
    if not isinstance(messages, list):
        raise ValueError("`messages` must be a list.")
    turns: list[dict[str, str]] = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        text = text_of(message.get("content")) if isinstance(message, dict) else None
        if not isinstance(role, str) or text is None:
            raise ValueError("each of `messages` needs a `role` and a text `content`.")
        turns.append({"role": role, "content": text})
    if turns and turns[0]["role"] in SYSTEM_ROLES:
        turns = turns[1:]
    while turns and turns[-1]["role"] == "assistant":
        last = turns.pop()
        answer = last["content"] if answer is None else answer
    roles = [turn["role"] for turn in turns]
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise ValueError("`messages` must alternate user and assistant, starting with user.")
    return Query(tuple(turns), answer)


def write_queries(path: Path, queries: Sequence[Query]) -> None:
    """Write queries as JSONL."""
    lines = [json.dumps(query.to_json(), ensure_ascii=False) for query in queries]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def drop_near_duplicates(
    queries: Sequence[Query], similar: float = _SIMILAR, *, beside: Sequence[Query] = ()
) -> list[Query]:
    """Keep the first of any queries whose word sets have a Jaccard similarity of at least `similar`.

    A probe (a query with facts) goes before other queries, and probes of different facts are
    both kept: their questions may differ in one word. `beside` are queries of another file;
    what is similar to one of them is dropped, whatever its facts.

    Exact, by prefix filtering: two such sets share one of the (1 - similar) |words| + 1
    words of either that are rarest in all queries, so only those are looked up.
    """
    rows = [*beside, *queries]
    bags = [frozenset(_WORD.findall(query.text.casefold())) or frozenset({query.text}) for query in rows]
    counts = Counter(word for bag in bags for word in bag)
    holders: dict[str, list[int]] = defaultdict(list)
    kept = []
    for i in sorted(range(len(rows)), key=lambda i: (i >= len(beside), not rows[i].facts)):
        bag = bags[i]
        rare = sorted(bag, key=lambda word: (counts[word], word))
        prefix = rare[: int((1 - similar) * len(rare) + 1e-9) + 1]
        seen = {j for word in prefix for j in holders[word]}
        if i >= len(beside):
            if any(
                len(bag & bags[j]) >= similar * len(bag | bags[j])
                for j in seen
                if j < len(beside) or not rows[i].facts or rows[j].facts == rows[i].facts
            ):
                continue
            kept.append(i)
        for word in prefix:
            holders[word].append(i)
    return [rows[i] for i in sorted(kept)]


def split_held_out(queries: Sequence[Query], held_out: int, *, latest: bool = False) -> tuple[list[Query], list[Query]]:
    """Shuffle and split into (training, held-out); near-duplicates must be gone already.

    The split depends on the queries alone: of the same file, runs of other seeds are measured on the same queries. At
    most a fifth is held out, at least one; with `latest` they are the last ones, as the newest of a user's traffic.
    Turns of one conversation (the same first turn) stay on one side, unless none that is short enough is left to
    hold out. Raises InputError for fewer than two queries.
    """
    if len(queries) < 2:
        raise InputError("At least two different queries are needed: one to train on, one held out.")
    shuffled = list(queries)
    random.Random(0).shuffle(shuffled)  # noqa: S311
    count = max(1, min(held_out, len(shuffled) // 5))
    candidates = queries[::-1] if latest else shuffled
    begun: dict[str, list[Query]] = defaultdict(list)
    for query in candidates:
        begun[query.messages[0]["content"].casefold()].append(query)
    kept: list[Query] = []
    for conversation in begun.values():
        if len(kept) + len(conversation) <= count:
            kept += conversation
    kept = kept or list(candidates[:count])
    apart = set(map(id, kept))
    return [query for query in shuffled if id(query) not in apart], kept


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as exc:
        raise InputError(f"Cannot read {path}: {exc}.") from exc
