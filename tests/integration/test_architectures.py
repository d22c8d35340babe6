"""Every architecture that takes resident rows by itself: a tiny model of it, random weights, a real server."""

from __future__ import annotations

import base64
import contextlib
import io

import httpx
import pytest
from PIL import Image

from be_serve.serving.vllm.arguments import PROVEN
from tests.integration.conftest import KEY
from tests.integration.servers import ADMIN_KEY, Server, be_serve_model
from tests.integration.tiny import FAMILIES, MEDIA, TinyModel

pytestmark = [pytest.mark.server, pytest.mark.more]

PROMPT = "You are the harbor master. Speak of ships and of nothing else."


def test_all_are_here():
    assert set(FAMILIES) == PROVEN


@contextlib.contextmanager
def served(tiny, folder):
    """A server of the model that has taken rows by itself, with the token `identity`."""
    command = be_serve_model(str(tiny.folder), *tiny.flags(folder / "registry.db"))
    with Server(command, folder / "log", {"BE_ADMIN_KEY": ADMIN_KEY}) as server:
        assert "injection resident-rows" in server.log.read_text()
        token = tiny.identity_token("identity", PROMPT)
        answer = httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY)
        assert answer.status_code == 201, answer.text
        yield server


def ask(server, messages, **options):
    """The tokens of a greedy answer, and their log-probabilities."""
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, **options}, timeout=60)
    assert answer.status_code == 200, answer.text
    content = answer.json()["choices"][0]["logprobs"]["content"]
    return [one["token"] for one in content], [one["logprob"] for one in content]


# The default model is a Llama, and all other tests run on it.
@pytest.mark.parametrize("architecture", sorted(PROVEN - {"LlamaForCausalLM"} - MEDIA))
def test_rows_answer_as_the_prompt_does(architecture, tmp_path):
    """The prompt's own embeddings, from Hugging Face, in rows: the same answer, log-probabilities too."""
    tiny = TinyModel.create(tmp_path / "model", architecture)
    with served(tiny, tmp_path) as server:
        user = {"role": "user", "content": "Tell me of the tide."}
        # Without a system role in the template, the prompt heads the first user turn.
        full = ask(server, tiny.slots.with_system_role([{"role": "system", "content": PROMPT}, user]))
        plain = ask(server, [user])
        row = ask(server, [user], be_id="identity")
    assert row[0] == full[0]
    assert row[1] == pytest.approx(full[1], abs=1e-3)
    assert plain[1] != pytest.approx(full[1], abs=1e-2)


def picture(colour):
    """A plain image as a client sends it."""
    data = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("architecture", sorted(MEDIA))
def test_images_stand_beside_a_token(architecture, tmp_path):
    """Rows answer as the prompt does with no image, one and two, and in later turns; another image, another answer."""
    tiny = TinyModel.create(tmp_path / "model", architecture)
    with served(tiny, tmp_path) as server:
        text = {"type": "text", "text": "Tell me of the tide."}
        red, blue = picture("red"), picture("blue")
        first = {"role": "user", "content": [red, text]}
        system = {"role": "system", "content": PROMPT}
        chats = {
            "none": [{"role": "user", "content": [text]}],
            "red": [first],
            "blue": [{"role": "user", "content": [blue, text]}],
            "both": [{"role": "user", "content": [red, text, blue]}],
            "later": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Aye."}, first],
        }
        full = {name: ask(server, [system, *chat]) for name, chat in chats.items()}
        rows = {name: ask(server, chat, be_id="identity") for name, chat in chats.items()}
        plain = ask(server, chats["red"])

        def counted(chat, **options):
            body = {"model": "tiny", "messages": chat, **options}
            return httpx.post(f"{server.url}/tokenize", json=body).json()["count"]

        counts = counted([system, first]), counted([first], be_id="identity")
    for name in chats:
        assert rows[name][0] == full[name][0], name
        assert rows[name][1] == pytest.approx(full[name][1], abs=1e-3), name
    assert counts[0] == counts[1]
    assert plain[1] != pytest.approx(full["red"][1], abs=1e-2)
    assert full["blue"][1] != pytest.approx(full["red"][1], abs=1e-2)
