"""Every architecture that takes resident rows by itself: a tiny model of it, random weights, a real server."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import torch
import transformers

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import SlotRenderer
from be_serve.serving.launch import PROVEN
from tests.conftest import make_tokenizer
from tests.integration.conftest import KEY
from tests.integration.servers import ADMIN_KEY, Server, be_serve_model

pytestmark = pytest.mark.server

PROMPT = "You are the harbor master. Speak of ships and of nothing else."
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
# The default model is a Llama, and all other tests run on it. Templates: a family without a system role is among them.
MODELS = {
    "Gemma2ForCausalLM": ("Gemma2Config", "gemma2"),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", "gemma3"),
    "MistralForCausalLM": ("MistralConfig", "mistral-v3"),
    "Qwen2ForCausalLM": ("Qwen2Config", "chatml"),
    "Qwen3ForCausalLM": ("Qwen3Config", "qwen3"),
}


def test_all_are_here():
    assert set(MODELS) | {"LlamaForCausalLM"} == PROVEN


@pytest.mark.parametrize("architecture", sorted(MODELS))
def test_rows_answer_as_the_prompt_does(architecture, tmp_path):
    """The prompt's own embeddings, from Hugging Face, in rows: the same answer, log-probabilities too."""
    config_name, template = MODELS[architecture]
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(template)
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        **SHAPE, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=1
    )
    model = getattr(transformers, architecture)(config).to(torch.float32)
    for parameter in model.parameters():  # far from uniform answers
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    fingerprint = fingerprint_folder(folder)
    ids = SlotRenderer(tokenizer).prompt_ids(PROMPT)
    # What a trained vector stands for: an input behind the model's own scaling of its embeddings.
    vectors = model.get_input_embeddings()(torch.tensor(ids)).detach().numpy().astype(np.float32)
    token = Token(
        Manifest(
            id="identity",
            base_model=BaseModelRef(name="tiny", fingerprint=fingerprint),
            hidden_size=64,
            k=len(ids),
            template_digest=fingerprint.chat_template,
            prompt=PromptRef(sha256=prompt_sha256(PROMPT), tokens=len(ids)),
        ),
        vectors,
    )
    command = be_serve_model(
        str(folder),
        "--served-model-name=tiny",
        f"--be-registry=sqlite:///{tmp_path / 'registry.db'}",
        "--be-rows=64",
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=512",
    )
    with Server(command, tmp_path / "log", {"BE_ADMIN_KEY": ADMIN_KEY}) as server:
        assert "injection resident-rows" in server.log.read_text()
        answer = httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY)
        assert answer.status_code == 201, answer.text

        def ask(messages, **options):
            body = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0, "logprobs": True}
            found = httpx.post(f"{server.url}/v1/chat/completions", json={**body, **options}, timeout=60).json()
            content = found["choices"][0]["logprobs"]["content"]
            return [one["token"] for one in content], [one["logprob"] for one in content]

        user = {"role": "user", "content": "Tell me of the tide."}
        # Without a system role in the template, the prompt heads the first user turn.
        full = ask(SlotRenderer(tokenizer).with_system_role([{"role": "system", "content": PROMPT}, user]))
        plain = ask([user])
        row = ask([user], be_id="identity")
    assert row[0] == full[0]
    assert row[1] == pytest.approx(full[1], abs=1e-3)
    assert plain[1] != pytest.approx(full[1], abs=1e-2)
