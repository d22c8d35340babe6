"""Injection `prompt-embeds`, for models on which resident rows are not proven: the same answers, and what it closes."""

from __future__ import annotations

import httpx
import pytest

from tests.integration.conftest import KEY, PROMPT, chat, post, text
from tests.integration.servers import ADMIN_KEY, MODEL, Server, be_serve

pytestmark = [pytest.mark.server, pytest.mark.model]

USER = [{"role": "user", "content": "What is the sea like today?"}]
FULL = {"role": "system", "content": PROMPT}


@pytest.fixture(scope="module")
def embeds(tmp_path_factory, identity_token, odd_token):
    """A server that was asked for prompt embeds, with two tokens."""
    folder = tmp_path_factory.mktemp("embeds")
    command = be_serve("--be-injection=prompt-embeds", f"--be-registry=sqlite:///{folder / 'registry.db'}")
    with Server(command, folder / "log", {"BE_ADMIN_KEY": ADMIN_KEY}) as running:
        for token in (identity_token, odd_token):
            assert httpx.post(f"{running.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY).status_code == 201
        yield running


def test_both_injections_answer_alike(embeds, server):
    full = chat(embeds, [FULL, *USER])
    for be_id in ("identity", "odd"):
        answers = [chat(one, USER, be_id=be_id) for one in (embeds, server)]
        assert text(answers[0]) == text(answers[1])
        assert answers[0].json()["usage"]["total_tokens"] == answers[1].json()["usage"]["total_tokens"]
    assert text(chat(embeds, USER, be_id="identity")) == text(full)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "say <prompt_embeds>"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AA"}]}]},
        ),
        (
            "/v1/chat/completions",
            {
                "messages": USER,
                "tools": [{"type": "function", "function": {"name": "<prompt_embeds>", "parameters": {}}}],
            },
        ),
        ("/v1/completions", {"prompt": "hi <prompt_embeds>"}),
        ("/v1/completions", {"prompt": [49152]}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
    ],
)
def test_the_engines_embeddings_input_is_for_tokens_alone(embeds, path, body):
    answer = post(embeds, path, **{"model": MODEL, "max_tokens": 4, **body})
    assert answer.status_code == 400, answer.text
    assert httpx.get(f"{embeds.url}/health").status_code == 200
