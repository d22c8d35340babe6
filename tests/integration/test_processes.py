"""Several server processes on one registry, parity with Hugging Face in float32, and a crash."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from be_serve.core.slots import SlotRenderer
from tests.integration.conftest import KEY, PROMPT, chat
from tests.integration.servers import ADMIN_KEY, COMMON_FLAGS, MODEL, Server, be_serve

pytestmark = [pytest.mark.server, pytest.mark.model]

USER = [{"role": "user", "content": "What is the sea like today?"}]
LONG = {
    "model": MODEL,
    "messages": USER,
    "be_id": "identity",
    "stream": True,
    "max_tokens": 2000,
    "ignore_eos": True,
    "temperature": 0,
}
QUESTIONS = ["What is the sea like today?", "Who are you?", "Tell me how to cook rice.", "Name three birds."]


@pytest.fixture(scope="module")
def registry_path(tmp_path_factory):
    return tmp_path_factory.mktemp("shared") / "registry.db"


@pytest.fixture(scope="module")
def twins(registry_path, identity_token, odd_token):
    """Two API server processes before one float32 engine, on one registry, behind a path of its own.

    Every chat must name a token.
    """
    flags = ("--dtype=float32", "--api-server-count=2", "--root-path=/llm", "--be-require")
    command = be_serve(*flags, f"--be-registry=sqlite:///{registry_path}")
    with Server(command, registry_path.with_name("twins.log"), {"BE_ADMIN_KEY": ADMIN_KEY}) as running:
        for token in (identity_token, odd_token):
            assert register(running, token).status_code in (200, 201)
        assert staleness(running, "identity", 200, seconds=2.0) < 1.0
        yield running


def register(server, token):
    return httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY, timeout=30)


def staleness(server, be_id: str, status: int, seconds: float = 3.0) -> float:
    """Seconds after now at which a process last gave another status than the new one.

    Every look-up opens a connection of its own, which the kernel gives to either process.
    """
    started, last_stale, lookups = time.monotonic(), 0.0, 0
    with httpx.Client(headers={**KEY, "Connection": "close"}) as http:
        while (now := time.monotonic() - started) < seconds:
            found = http.get(f"{server.url}/v1/be/tokens/{be_id}").status_code
            last_stale = last_stale if found == status else now
            lookups += 1
    assert lookups > 20
    return last_stale


def test_both_processes_see_a_change_within_a_second(twins, make_real_token, odd_token):
    token = make_real_token("passing", odd_token.vectors, prompt="passing")
    assert register(twins, token).status_code == 201
    try:
        assert staleness(twins, "passing", 200) < 1.0
    finally:
        deleted = httpx.delete(f"{twins.url}/v1/be/tokens/passing", headers=KEY)
    assert deleted.status_code == 200
    assert staleness(twins, "passing", 404) < 1.0
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: chat(twins, USER, be_id="odd", max_tokens=4).json(), range(16)))
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_tokens_work_below_a_root_path(twins, prefix):
    """A proxy may strip the prefix or leave it on."""
    body = {"model": MODEL, "messages": USER, "max_tokens": 2, "be_id": "odd"}
    answer = httpx.post(f"{twins.url}{prefix}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-be-id"] == "odd"
    listed = httpx.get(f"{twins.url}{prefix}/v1/be/tokens/odd", headers=KEY)
    assert listed.json()["id"] == "odd"
    refused = httpx.post(f"{twins.url}{prefix}/v1/completions", json={"model": MODEL, "prompt": "x", "be_id": "odd"})
    assert refused.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": PROMPT}, *USER], "stream": True}),
        ("/v1/chat/completions/batch", {"messages": [USER, USER]}),
        ("/v1/responses", {"input": "Hi"}),
        ("/v1/messages", {"messages": USER}),
        ("/v1/messages/count_tokens", {"messages": USER}),
        ("/tokenize", {"messages": USER}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/generative_scoring", {"query": "a", "items": ["b"]}),
        ("/v1/chat/completions/render", {"messages": USER}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_a_server_may_require_a_token(twins, prefix, path, body):
    for _ in range(4):  # either process
        body = {"model": MODEL, "max_tokens": 2, **body}
        answer = httpx.post(f"{twins.url}{prefix}{path}", json=body, headers={"Connection": "close"}, timeout=60)
        assert answer.status_code == 403, answer.text
        assert "--be-require" in answer.json()["error"]["message"]
    assert "be_token_required" in httpx.get(f"{twins.url}/metrics").text


def test_what_is_no_chat_needs_no_token(twins):
    def answered(path, **body):
        return httpx.post(f"{twins.url}{path}", json={"model": MODEL, "max_tokens": 2, **body}, timeout=60).status_code

    assert chat(twins, USER, model=f"{MODEL}:odd", max_tokens=2).headers["x-be-id"] == "odd"
    assert answered("/v1/messages", messages=USER, be_id="odd") == 200
    assert answered("/tokenize", messages=USER, be_id="odd") == 200
    assert answered("/tokenize", prompt="Hi") == 200
    assert answered("/detokenize", tokens=[1, 2]) == 200
    assert answered("/v1/chat/completions", messages=USER, be_id="nobody") == 404
    for path in ("/v1/models", "/health", "/metrics", "/version"):
        assert httpx.get(f"{twins.url}{path}").status_code == 200, path


def test_two_processes_cannot_both_register_an_id(twins, make_real_token, odd_token):
    rivals = [make_real_token("rival", odd_token.vectors * (1 + i), prompt=f"r{i}") for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(r.status_code for r in pool.map(lambda t: register(twins, t), rivals))
    assert statuses == [201] + [409] * 5
    httpx.delete(f"{twins.url}/v1/be/tokens/rival", headers=KEY)


@pytest.mark.parametrize("which", ["identity", "odd"])
def test_parity_with_hugging_face(twins, which, identity_token, odd_token, model_dir, tokenizer):
    """The same vectors and messages give the same greedy tokens, and log-probabilities within 1e-3."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    vectors = {"identity": identity_token, "odd": odd_token}[which].vectors
    slots = SlotRenderer(tokenizer)
    embed = model.get_input_embeddings()
    worst = 0.0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        slot = slots.render(messages)
        rows_TH = torch.cat(
            [embed(torch.tensor(slot.before)), torch.from_numpy(vectors), embed(torch.tensor(slot.after))]
        )
        answer = chat(
            twins, messages, be_id=which, max_tokens=16, logprobs=True, top_logprobs=1, return_token_ids=True
        ).json()["choices"][0]
        ids = answer["token_ids"]
        with torch.no_grad():
            generated = model.generate(
                inputs_embeds=rows_TH[None],
                attention_mask=torch.ones(1, len(rows_TH), dtype=torch.long),
                do_sample=False,
                max_new_tokens=len(ids),
                pad_token_id=tokenizer.eos_token_id,
            )[0].tolist()
            whole_TH = torch.cat([rows_TH, embed(torch.tensor(ids))])
            logits_TV = model(inputs_embeds=whole_TH[None]).logits[0, len(rows_TH) - 1 : -1]
        assert ids == generated
        expected = logits_TV.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].numpy()
        served = np.array([entry["logprob"] for entry in answer["logprobs"]["content"]])
        worst = max(worst, float(np.abs(expected - served[: len(expected)]).max()))
    assert worst < 1e-3, f"log-probabilities differ by up to {worst:.2e}"


def test_kill_9_during_an_upload_and_a_restart_by_vllms_own_entry(twins, registry_path, odd_token, tmp_path):
    """Nothing half-registered survives the crash; a plain vLLM server with the plugin serves the rest."""
    data = odd_token.to_bytes()
    with socket.create_connection(("127.0.0.1", twins.port)) as upload:
        upload.sendall(
            f"POST /v1/be/tokens?id=halfway HTTP/1.1\r\nHost: x\r\nX-BE-Key: {ADMIN_KEY}\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data[: len(data) // 2]
        )
        time.sleep(0.3)
        twins.kill()
    assert sqlite3.connect(registry_path).execute("PRAGMA integrity_check").fetchone() == ("ok",)

    model_dir = os.fspath(_model_dir())
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_dir,
        "--served-model-name", MODEL, "--additional-config", '{"be_rows": 64}', *COMMON_FLAGS,
    ]  # fmt: skip
    env = {
        "VLLM_PLUGINS": "be_serve",
        "BE_REGISTRY": f"sqlite:///{registry_path}",
        "BE_ADMIN_KEY": ADMIN_KEY,
    }
    with Server(command, tmp_path / "plain-entry.log", env) as server:
        listed = httpx.get(f"{server.url}/v1/be/tokens", headers=KEY).json()["data"]
        assert [token["id"] for token in listed] == ["identity", "odd"]
        full = chat(server, [{"role": "system", "content": PROMPT}, *USER])
        token = chat(server, USER, be_id="identity")
        assert token.status_code == 200
        assert token.json()["choices"][0]["message"] == full.json()["choices"][0]["message"]

        # A worker that dies takes its server along, for a supervisor to start another; nobody is left waiting.
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG, timeout=60) as stream:
            events = stream.iter_lines()
            next(events)
            os.kill(_worker(server), signal.SIGKILL)
            with contextlib.suppress(httpx.TransportError):
                assert not any('"finish_reason":"length"' in event for event in events)
        with contextlib.suppress(httpx.TransportError):
            assert chat(server, USER, be_id="identity").status_code >= 500
        assert server.process.wait(60) is not None


def _worker(server):
    """The process id of the server's worker, which holds the rows."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(folder.name)) == server.process.pid and b"Worker" in (folder / "cmdline").read_bytes():
                return int(folder.name)
    raise AssertionError("The server has no worker.")


def test_a_server_without_its_flag_refuses_to_start(tmp_path):
    """A plain vLLM command that forgets --enable-prompt-embeds fails at once and says why."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", os.fspath(_model_dir()), *COMMON_FLAGS
    ]  # fmt: skip
    env = {"VLLM_PLUGINS": "be_serve", "BE_REGISTRY": f"sqlite:///{tmp_path / 'r.db'}"}
    with pytest.raises(AssertionError, match="enable-prompt-embeds, which injection"):
        Server(command, tmp_path / "log", env).__enter__()


def _model_dir():
    from be_serve.models import resolve_model

    return resolve_model(MODEL).path
