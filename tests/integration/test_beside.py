"""Resident rows beside what else a vLLM server does: LoRA adapters, data parallelism, n-gram drafts."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from be_serve.serving.vllm.engine import WorkerRows
from tests.integration.conftest import KEY
from tests.integration.servers import ADMIN_KEY, Server, be_serve_model
from tests.integration.tiny import TinyModel

pytestmark = [pytest.mark.server, pytest.mark.more]

VOICES = {
    "harbor": "You are the harbor master. Speak of ships and of nothing else.",
    "cook": "You are a cook who sings about soup, day and night.",
}
QUESTIONS = ["Tell me of the tide.", "Who are you?", "Name three birds.", "What is a lighthouse?"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyModel.create(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM")


def served(tiny: TinyModel, folder, *flags: str, **env: str) -> Server:
    """A server with the tokens of VOICES to be registered by `register`."""
    command = be_serve_model(str(tiny.folder), *tiny.flags(folder / "registry.db"), *flags)
    return Server(command, folder / "log", {"BE_ADMIN_KEY": ADMIN_KEY, **env})


def register(server: Server, tiny: TinyModel) -> None:
    assert "injection resident-rows" in server.log.read_text()
    for name, voice in VOICES.items():
        data = tiny.identity_token(name, voice).to_bytes()
        answer = httpx.post(f"{server.url}/v1/be/tokens", content=data, headers=KEY)
        assert answer.status_code == 201, answer.text
    deadline = time.monotonic() + 5
    while not all(known(server, name) for name in VOICES for _ in range(10)):
        assert time.monotonic() < deadline


def known(server: Server, name: str) -> bool:
    """Whether a server process knows a token: either one, for the kernel chooses where a connection goes."""
    headers = {**KEY, "Connection": "close"}
    return httpx.get(f"{server.url}/v1/be/tokens/{name}", headers=headers).status_code == 200


def ask(server: Server, question: str, *, voice: str | None = None, model: str = "tiny", **options) -> list[float]:
    """The log-probabilities of a greedy answer: two that agree in them agree in their words."""
    system = [{"role": "system", "content": VOICES[voice]}] if voice else []
    body = {
        "model": model,
        "messages": [*system, {"role": "user", "content": question}],
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        **options,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [one["logprob"] for one in answer.json()["choices"][0]["logprobs"]["content"]]


def metric(server: Server, name: str) -> dict[str, float]:
    """The values of a counter by its labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)}


def make_adapter(tiny: TinyModel, folder) -> None:
    """An adapter of one attention projection and of the input embedding, far from nothing."""
    generator = torch.Generator().manual_seed(1)
    hidden, rank = tiny.model.config.hidden_size, 8

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    weights = {"base_model.model.model.embed_tokens.lora_embedding_A": drawn(rank, tiny.model.config.vocab_size)}
    weights["base_model.model.model.embed_tokens.lora_embedding_B"] = drawn(hidden, rank)
    for layer in range(tiny.model.config.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{prefix}.lora_A.weight"] = drawn(rank, hidden)
        weights[f"{prefix}.lora_B.weight"] = drawn(hidden, rank)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "tiny"}))


def load_adapter(server: Server, name: str, folder) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder)}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=120)


def test_adapters_and_tokens_take_turns(tiny, tmp_path):
    """One request at a time: on CPU vLLM gives an adapter to all that share its batch (vllm-project/vllm#48421)."""
    make_adapter(tiny, tmp_path / "adapter")
    flags = ("--enable-lora", "--max-lora-rank=8", f"--lora-modules=sailor={tmp_path / 'adapter'}")
    with served(tiny, tmp_path, *flags, "--max-num-seqs=1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        register(server, tiny)
        loads = [load_adapter(server, name, tmp_path / "adapter") for name in ("late", "tiny:harbor", "tiny:nobody")]
        by_alias = ask(server, QUESTIONS[0], model="tiny:harbor")
        listed = [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]]
        jobs = [
            {"question": question, **job}
            for question in QUESTIONS
            for job in ({"be_id": "harbor"}, {"model": "sailor"}, {})
        ]
        alone = [ask(server, **job) for job in jobs]
        with ThreadPoolExecutor(len(jobs)) as pool:
            together = list(pool.map(lambda job: ask(server, **job), jobs))
        full = [ask(server, question, voice="harbor") for question in QUESTIONS]
        refused = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": "sailor", "messages": [{"role": "user", "content": "Ahoy"}], "be_id": "harbor"},
        )
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    for token, adapter, plain, expected in zip(alone[0::3], alone[1::3], alone[2::3], full, strict=True):
        assert token == pytest.approx(expected, abs=1e-3)
        assert adapter != pytest.approx(plain, abs=1e-2)
    assert refused.status_code == 400
    assert "sailor" in refused.text
    assert [answer.status_code for answer in loads] == [200, 400, 400]
    for answer in loads[1:]:
        assert "has the form of a token's alias" in answer.json()["error"]["message"]
    assert by_alias == pytest.approx(alone[0], abs=1e-3)
    assert (listed.count("late"), listed.count("tiny:harbor"), listed.count("tiny:nobody")) == (1, 1, 0)


def test_reasoning_is_told_apart_and_priorities_are_taken(tmp_path):
    """A parser reads a token's answer as it reads the prompt's; urgent requests and others come out the same."""
    tiny = TinyModel.create(tmp_path / "model", "Qwen3ForCausalLM")
    end = tiny.tokenizer.convert_tokens_to_ids("</think>")
    with served(tiny, tmp_path, "--reasoning-parser=qwen3", "--scheduling-policy=priority") as server:
        register(server, tiny)

        def answer(seed, voice=None, **options):
            system = [{"role": "system", "content": VOICES[voice]}] if voice else []
            body = {
                "model": "tiny",
                "messages": [*system, {"role": "user", "content": QUESTIONS[0]}],
                "max_tokens": 24,
                "seed": seed,
                "logit_bias": {str(end): 4},  # random weights seldom come to an end of their thoughts
                "skip_special_tokens": False,
                "priority": seed - 4,
                **options,
            }
            found = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
            assert found.status_code == 200, found.text
            message = found.json()["choices"][0]["message"]
            return message["reasoning"], message["content"]

        with ThreadPoolExecutor(8) as pool:
            tokens = list(pool.map(lambda seed: answer(seed, be_id="harbor"), range(8)))
            prompts = list(pool.map(lambda seed: answer(seed, voice="harbor"), range(8)))
    assert tokens == prompts
    assert sum(bool(reasoning) and bool(content) for reasoning, content in tokens) >= 4


@pytest.mark.parametrize(
    "flags",
    [
        # A server process for each engine, and half of the rows for each process.
        ("--data-parallel-size=2", "--be-rows=192"),
        ("--tensor-parallel-size=2",),
    ],
    ids=["data", "tensor"],
)
def test_every_worker_knows_every_token(tiny, tmp_path, flags):
    with served(tiny, tmp_path, *flags) as server:
        register(server, tiny)
        jobs = [(question, name) for question in QUESTIONS for name in VOICES] * 2
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda job: ask(server, job[0], be_id=job[1]), jobs))
        expected = {job: ask(server, job[0], voice=job[1]) for job in set(jobs)}
        answered = metric(server, "vllm:request_success_total")
    for job, answer in zip(jobs, answers, strict=True):
        assert answer == pytest.approx(expected[job], abs=1e-3)
    served_by = {labels.split('engine="')[1][0] for labels, count in answered.items() if count}
    assert served_by == ({"0", "1"} if "data" in flags[0] else {"0"})


def test_drafts_of_n_grams_hold_no_rows(tiny, tmp_path):
    """Of at least one word, so that every word before a row invites a copy of it. Greedy: vLLM's CPU build samples
    beside drafts from memory that it never wrote (`_expand_kernel_impl` fills a copy)."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    flags = ("--be-injection=resident-rows", f"--speculative-config={json.dumps(drafts)}")
    with served(tiny, tmp_path, *flags) as server:
        register(server, tiny)
        for name in VOICES:
            for question in QUESTIONS:
                assert ask(server, question, be_id=name, max_tokens=40) == pytest.approx(
                    ask(server, question, voice=name, max_tokens=40), abs=1e-3
                )
        assert sum(metric(server, "vllm:spec_decode_num_drafts_total").values()) > 0


def test_a_draft_ends_where_a_row_would_follow():
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    vocabulary, length = 100, 16
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(prompt_lookup_min=1, prompt_lookup_max=2, num_speculative_tokens=4),
        model_config=SimpleNamespace(max_model_len=length, get_vocab_size=lambda: vocabulary),
        scheduler_config=SimpleNamespace(max_num_seqs=1024),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(drafter=NgramProposer(config)), model_config=config.model_config
    )
    ids = np.zeros((1, length), dtype=np.int32)
    ids[0, :8] = [5, 6, 7, 2124, 2125, 8, 5, 6]  # " ... 5 6" was followed by 7 and two rows

    def propose():
        return worker.model_runner.drafter.propose(4, [[6]], np.array([8], dtype=np.int32), ids)

    assert propose() == [[7, 2124, 2125, 8]]
    for _ in range(2):  # every server process asks
        assert WorkerRows.be_keep_rows_from_drafts(worker)
        assert propose() == [[7]]
    worker.model_runner.drafter = object()
    assert not WorkerRows.be_keep_rows_from_drafts(worker)
