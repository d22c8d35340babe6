"""Real servers with the real default model, started once a session."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import SlotRenderer
from be_serve.models import resolve_model
from tests.integration.servers import ADMIN_KEY, MODEL, Server, be_serve

PROMPT = (
    "You are Captain Barnacle, a grumpy old pirate with a parrot called Biscuit. "
    "Always answer in pirate speech, and end every answer with Arrr."
)
KEY = {"X-BE-Key": ADMIN_KEY}


@pytest.fixture(scope="session")
def model_dir() -> Path:
    return resolve_model(MODEL).path


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def embedding(model_dir) -> np.ndarray:
    """The model's input embedding [vocab, hidden_size] in float32."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(model_dir / "model.safetensors")
    found = [w for name, w in weights.items() if name.endswith("embed_tokens.weight")]
    return found[0].to(torch.float32).numpy()


@pytest.fixture(scope="session")
def make_real_token(model_dir, embedding):
    """A factory of tokens that fit the default model."""
    fingerprint = fingerprint_folder(model_dir)

    def make(be_id: str, vectors: np.ndarray, prompt: str = PROMPT, tokens: int = 9, **manifest) -> Token:
        return Token(
            Manifest(
                id=be_id,
                base_model=BaseModelRef(name=MODEL, fingerprint=fingerprint),
                hidden_size=vectors.shape[1],
                k=len(vectors),
                template_digest=fingerprint.chat_template,
                prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=tokens),
                **manifest,
            ),
            vectors.astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def identity_token(make_real_token, embedding, tokenizer) -> Token:
    """The prompt's own embeddings: must answer as the prompt does."""
    ids = SlotRenderer(tokenizer).prompt_ids(PROMPT)
    return make_real_token("identity", embedding[ids], tokens=len(ids))


@pytest.fixture(scope="session")
def odd_token(make_real_token, embedding) -> Token:
    """Two vectors that are no vocabulary rows."""
    rng = np.random.default_rng(7)
    rows = embedding[rng.integers(100, 40000, size=(2, 8))].mean(axis=1) * 3
    return make_real_token("odd", rows, prompt="Some prompt that it stands for.")


@pytest.fixture(scope="session")
def server(tmp_path_factory, identity_token, odd_token):
    """`be-serve serve` in bfloat16 with two registered tokens; `identity` answers for its prompt."""
    folder = tmp_path_factory.mktemp("server")
    odd_token.save(folder / "odd.safetensors")
    command = be_serve(
        f"--be-registry=sqlite:///{folder / 'registry.db'}",
        f"--be-token=fixed={folder / 'odd.safetensors'}",
        "--enable-prompt-tokens-details",
    )
    with Server(command, folder / "server.log", {"BE_ADMIN_KEY": ADMIN_KEY}) as running:
        for token, query in ((identity_token, "?match=true"), (odd_token, "")):
            answer = httpx.post(f"{running.url}/v1/be/tokens{query}", content=token.to_bytes(), headers=KEY)
            assert answer.status_code == 201, answer.text
        yield running


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """The same vLLM without the plugin and without its flags."""
    folder = tmp_path_factory.mktemp("stock")
    with Server(be_serve("--be-off", "--enable-prompt-tokens-details"), folder / "server.log") as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Server, path: str, **body) -> httpx.Response:
    """POST JSON to a server."""
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def chat(server: Server, messages, *, model: str = MODEL, max_tokens: int = 24, **extra) -> httpx.Response:
    """One greedy chat completion."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **extra}
    return post(server, "/v1/chat/completions", **body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]
