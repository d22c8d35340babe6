"""Every architecture that takes resident rows by itself: a tiny model of it, random weights, a real server."""

from __future__ import annotations

import httpx
import pytest

from be_serve.serving.launch import PROVEN
from tests.integration.conftest import KEY
from tests.integration.servers import ADMIN_KEY, Server, be_serve_model
from tests.integration.tiny import FAMILIES, TinyModel

pytestmark = pytest.mark.server

PROMPT = "You are the harbor master. Speak of ships and of nothing else."


def test_all_are_here():
    assert set(FAMILIES) == PROVEN


# The default model is a Llama, and all other tests run on it.
@pytest.mark.parametrize("architecture", sorted(PROVEN - {"LlamaForCausalLM"}))
def test_rows_answer_as_the_prompt_does(architecture, tmp_path):
    """The prompt's own embeddings, from Hugging Face, in rows: the same answer, log-probabilities too."""
    tiny = TinyModel.create(tmp_path / "model", architecture)
    command = be_serve_model(str(tiny.folder), *tiny.flags(tmp_path / "registry.db"))
    with Server(command, tmp_path / "log", {"BE_ADMIN_KEY": ADMIN_KEY}) as server:
        assert "injection resident-rows" in server.log.read_text()
        token = tiny.identity_token("identity", PROMPT)
        answer = httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY)
        assert answer.status_code == 201, answer.text

        def ask(messages, **options):
            body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True}
            found = httpx.post(f"{server.url}/v1/chat/completions", json={**body, **options}, timeout=60).json()
            content = found["choices"][0]["logprobs"]["content"]
            return [one["token"] for one in content], [one["logprob"] for one in content]

        user = {"role": "user", "content": "Tell me of the tide."}
        # Without a system role in the template, the prompt heads the first user turn.
        full = ask(tiny.slots.with_system_role([{"role": "system", "content": PROMPT}, user]))
        plain = ask([user])
        row = ask([user], be_id="identity")
    assert row[0] == full[0]
    assert row[1] == pytest.approx(full[1], abs=1e-3)
    assert plain[1] != pytest.approx(full[1], abs=1e-2)
