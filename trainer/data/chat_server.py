"""OpenAI-compatible servers that a run asks.

teacher    the same model: writes the responses
writer     a larger model: writes queries at the prompt's sentences
judge      any model: compares answers
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx

from be_serve.core.addresses import checked_key, is_local, warn_of_clear_text
from be_serve.core.digests import digest_of
from be_serve.core.errors import InputError
from be_serve.core.redaction import hide, holds_credentials
from trainer.config import TrainConfig
from trainer.data.aimed import QUERY_TOKENS, TEMPERATURE, Chat, Writer, whole_lines
from trainer.data.queries import Query, read_queries, write_queries
from trainer.model.frozen import FrozenModel
from trainer.model.generate import Progress

TEACHER_KEY = "BE_TEACHER_KEY"
WRITER_KEY = "BE_WRITER_KEY"
_AT_ONCE = 16
_TRIES = 5
_KEPT_TOGETHER = 64
# Queries whose answers are asked, and kept in a file, at a time.
_BUSY = (429, 502, 503)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Answer(NamedTuple):
    """A server's answer, and whether it was cut off at its length."""

    text: str
    cut: bool


class Endpoint:
    """A server's chat completions. `role` (teacher, writer, judge) names it in errors.

    The key, where one is needed, is read from the environment variable `key_variable`:
    it must stand in no file and in no process list. A server on this machine is asked directly,
    past a proxy of the environment. A busy server is asked again; a redirect is not followed.
    """

    def __init__(self, url: str, model: str, *, role: str, key_variable: str) -> None:
        if holds_credentials(url):
            raise InputError(
                f"--{role}-url: leave user, password and key out of the URL; a key comes from {key_variable}."
            )
        self.base = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.role = role
        key = checked_key(os.environ.get(key_variable, ""), key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._secrets = {key} if key else set()
        try:
            server = httpx.URL(self.base)
            # A transport of its own reads no proxy from the environment; certificates it still does.
            direct = httpx.HTTPTransport() if is_local(server.host) else None
            self._client = httpx.Client(base_url=self.base, headers=headers, timeout=600, transport=direct)
        except httpx.InvalidURL as exc:
            raise InputError(f"--{role}-url {url!r} is no URL: {exc}.") from exc
        if key:
            warn_of_clear_text(server.scheme, server.host, by_proxy=True)

    def chat(self, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any]) -> Answer:
        """The answer to a chat. Raises InputError where the server cannot be reached, or refuses."""
        body = {"model": self.model, **settings, "messages": list(messages)}
        for attempt in range(1, _TRIES + 1):
            try:
                response = self._client.post("/v1/chat/completions", json=body)
            except (httpx.TransportError, httpx.UnsupportedProtocol) as exc:
                why = hide(str(exc), self._secrets)
                raise InputError(f"No answer from the {self.role} at {self.base}: {why}.") from None
            if response.status_code not in _BUSY or attempt == _TRIES:
                break
            time.sleep(2.0**attempt)
        if not response.is_success:
            said = hide(response.text, self._secrets)[:300]
            raise InputError(f"The {self.role} at {self.base} answered {response.status_code}: {said}")
        try:
            choice = response.json()["choices"][0]
            return Answer(choice["message"]["content"] or "", choice.get("finish_reason") == "length")
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            said = hide(response.text, self._secrets)[:300]
            raise InputError(f"The {self.role} at {self.base} sent no chat completion: {said}") from exc

    def each(self, ask: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
        """`ask` of each item, in order, several at a time; the connections are closed behind them."""
        with self._client, ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(ask, items))


def answered(
    queries: Sequence[Query],
    prompt: str,
    *,
    url: str,
    model: str,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    template_kwargs: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Query]:
    """The queries with the server's answers under the prompt as `answer`.

    The server must run the same model: the teacher's states are still computed here, on
    the text it answers with. A token that serves this very prompt is passed over
    (`be_match`). Raises InputError where the server cannot be reached or refuses.
    """
    server = Endpoint(url, model, role="teacher", key_variable=TEACHER_KEY)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "be_match": False}
    if template_kwargs:
        settings["chat_template_kwargs"] = dict(template_kwargs)
    if stop:
        settings["stop"] = list(stop)
        settings["include_stop_str_in_output"] = True  # vLLM: the text that ends a response is part of what is learned

    def ask(query: Query) -> Query:
        answer = server.chat([{"role": "system", "content": prompt}, *query.messages], settings)
        if progress:
            progress(1)
        ended_by_text = any(text in answer.text for text in stop)  # then no end of turn follows either
        return replace(query, answer=answer.text, cut=answer.cut or ended_by_text)

    return server.each(ask, queries)


def served_answers(
    config: TrainConfig, model: FrozenModel, prompt: str, queries: Sequence[Query], folder: Path, progress: Progress
) -> list[Query]:
    """The queries with the server's answers. Raises InputError where it cannot be reached or refuses."""
    assert config.teacher_url is not None
    asked_as: dict[str, Any] = {
        "url": config.teacher_url,
        "model": config.teacher_model or config.model,
        "max_tokens": config.response_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "stop": config.stop,
        "template_kwargs": model.template_kwargs,
    }
    found: list[Query] = []
    for start in range(0, len(queries), _KEPT_TOGETHER):
        asked = queries[start : start + _KEPT_TOGETHER]
        key = [prompt, asked_as, str(model.fingerprint), [query.chat_json() for query in asked]]
        kept = folder / f"answers-{digest_of(key)}.jsonl"
        if kept.exists():
            # The facts are this run's own: the key does not hold them.
            found += [
                replace(now, answer=then.answer, cut=then.cut)
                for now, then in zip(asked, read_queries(kept), strict=True)
            ]
            progress(len(asked))
            continue
        made = answered(asked, prompt, **asked_as, progress=progress)
        write_queries(kept, made)
        found += made
    return found


def served_writer(url: str, model: str, *, seed: int, progress: Progress) -> Writer:
    """A writer of queries on a server, which is sent the sentences of the prompt.

    It raises InputError where the server cannot be reached or refuses. `progress` is called with the chats answered.
    """

    def write(chats: Sequence[Chat]) -> list[str]:
        server = Endpoint(url, model, role="writer", key_variable=WRITER_KEY)
        settings = {"max_tokens": 2 * QUERY_TOKENS, "temperature": TEMPERATURE}

        def one(numbered: tuple[int, Chat]) -> str:
            number, chat = numbered
            answer = server.chat(chat, {**settings, "seed": seed + number})
            progress(1)
            return whole_lines(answer.text, cut=answer.cut)

        return server.each(one, enumerate(chats))

    return write
