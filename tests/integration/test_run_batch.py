"""`be-serve run-batch` on the real model: without a server, and through one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.integration.conftest import PROMPT
from tests.integration.servers import MODEL

pytestmark = [pytest.mark.server, pytest.mark.model]

ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
USER = {"role": "user", "content": "What is the sea like today?"}
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 24, "max_output_tokens": 24}  # responses' own name for it


def row(custom_id: str, url: str = "/v1/chat/completions", **body) -> dict:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**GREEDY, **body}}


ROWS = [
    row("full", messages=[{"role": "system", "content": PROMPT}, USER]),
    row("identity", messages=[USER], be_id="identity"),
    row("odd", messages=[USER], be_id="odd"),
    row("unknown", messages=[USER], be_id="nobody"),
    row("plain", messages=[USER]),
    row("completion", url="/v1/completions", prompt="The sea is"),
    row("response", url="/v1/responses", input="What is the sea like today?", be_id="identity"),
]


def run(folder, name: str, *arguments: str) -> tuple[dict[str, dict], str]:
    """The answers by custom_id, and what the command said."""
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in ROWS), encoding="utf-8")
    command = [sys.executable, "-m", "be_serve.cli.main", "run-batch", *arguments]
    command += ["-i", str(folder / "in.jsonl"), "-o", str(folder / name), "--concurrency", "1"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stderr[-4000:]  # a row is refused
    lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    assert [line["custom_id"] for line in lines] == [line["custom_id"] for line in ROWS]
    return {line["custom_id"]: line for line in lines}, done.stdout


def text(answer: dict) -> str:
    body = answer["response"]["body"]
    if "output" in body:
        return body["output"][-1]["content"][0]["text"]
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_a_file_is_answered_with_and_without_a_server(tmp_path, server, identity_token, odd_token):
    """One after the other: the engine of the first has ended before the second asks."""
    identity_token.save(tmp_path / "identity.safetensors")
    odd_token.save(tmp_path / "odd.safetensors")
    tokens = [f"--be-token={be_id}={tmp_path / be_id}.safetensors" for be_id in ("identity", "odd")]
    engine = ["--max-model-len", "1024", "--dtype", "bfloat16", "--enforce-eager"]
    registry = f"--be-registry=sqlite:///{tmp_path / 'registry.db'}"
    alone, said = run(tmp_path, "alone.jsonl", MODEL, registry, *tokens, *engine)
    assert "6 answered, 1 refused, 0 failed" in said
    assert text(alone["identity"]) == text(alone["full"]) == text(alone["response"])
    assert text(alone["plain"]) != text(alone["full"])
    assert alone["unknown"]["response"]["status_code"] == 404
    assert "nobody" in alone["unknown"]["error"]["message"]

    through, said = run(tmp_path, "through.jsonl", "--url", server.url)
    assert "6 answered, 1 refused, 0 failed" in said
    assert {key: answer["error"] and answer["error"]["code"] for key, answer in through.items()} == {
        key: answer["error"] and answer["error"]["code"] for key, answer in alone.items()
    }
    assert [text(through[name]) for name in ("full", "identity", "odd", "plain", "completion", "response")] == [
        text(alone[name]) for name in ("full", "identity", "odd", "plain", "completion", "response")
    ]
