"""Responses of the full prompt from an OpenAI-compatible server, in place of decoding here.

The server must run the same model: the teacher's states are still computed here,
on the text it answers with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx

from be_serve.core.errors import InputError
from trainer.generate import Progress
from trainer.queries import Query

KEY_VARIABLE = "BE_TEACHER_KEY"
_AT_ONCE = 16
_TRIES = 5
_BUSY = (429, 502, 503)


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
    progress: Progress | None = None,
) -> list[Query]:
    """The queries with the server's answers under the prompt as `answer`.

    A key is read from BE_TEACHER_KEY. A token that serves this very prompt is passed
    over (`be_match`). Raises InputError where the server cannot be reached or refuses.
    """
    key = os.environ.get(KEY_VARIABLE)
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    fixed: dict[str, Any] = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    if stop:
        fixed["stop"] = list(stop)
        fixed["include_stop_str_in_output"] = True  # vLLM: the text that ends a response is part of what is learned

    try:
        client = httpx.Client(base_url=base, headers=headers, timeout=600)
    except httpx.InvalidURL as exc:
        raise InputError(f"--teacher-url {url!r} is no URL: {exc}.") from exc

    def ask(query: Query) -> Query:
        messages = [{"role": "system", "content": prompt}, *query.messages]
        body = {**fixed, "messages": messages, "be_match": False}
        for attempt in range(1, _TRIES + 1):
            try:
                response = client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as exc:
                raise InputError(f"No answer from the teacher at {base}: {exc}.") from exc
            if response.status_code not in _BUSY or attempt == _TRIES:
                break
            time.sleep(2.0**attempt)
        if not response.is_success:
            raise InputError(f"The teacher at {base} answered {response.status_code}: {response.text[:300]}")
        try:
            answer = response.json()["choices"][0]["message"]["content"] or ""
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            raise InputError(f"The teacher at {base} sent no chat completion: {response.text[:300]}") from exc
        if progress:
            progress(1)
        return replace(query, answer=answer)

    with client, ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(ask, queries))
