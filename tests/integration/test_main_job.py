"""The main job by the commands a user types: prompt file -> token -> register -> chat -> remove."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from tests.integration.conftest import PROMPT
from tests.integration.servers import ADMIN_KEY, MODEL

pytestmark = [pytest.mark.server, pytest.mark.model]

BE_SERVE = str(Path(sys.executable).with_name("be-serve"))


def be_serve(*arguments: str, status: int = 0) -> str:
    done = subprocess.run([BE_SERVE, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_from_prompt_file_to_chat(server, tmp_path):
    prompt, token = tmp_path / "prompt.txt", tmp_path / "cli-token.safetensors"
    prompt.write_text(PROMPT.replace("Barnacle", "Bartholomew") + "\n\n")
    remote = ("--url", server.url, "--api-key", ADMIN_KEY)

    be_serve("from-text", str(prompt), "--model", MODEL, "-o", str(token))
    assert "cli-token" in be_serve("inspect", str(token))
    assert "Registered cli-token version 1" in be_serve("register", str(token), "--match", *remote)
    assert "Already registered" in be_serve("register", str(token), *remote)
    assert "cli-token" in be_serve("list", *remote)
    assert json.loads(be_serve("show", "cli-token", *remote))["match"] is True

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    user = {"role": "user", "content": "Who are you?"}
    system = {"role": "system", "content": prompt.read_text().rstrip()}

    def ask(*messages, **extra):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=list(messages), temperature=0, max_tokens=24, extra_body=extra
        )
        return raw.parse().choices[0].message.content, raw.headers.get("x-be-id")

    full, nobody = ask(system, user, be_match=False)
    assert nobody is None
    assert ask(user, be_id="cli-token") == (full, "cli-token")
    assert ask(system, user) == (full, "cli-token")

    assert "Removed cli-token" in be_serve("remove", "cli-token", *remote)
    assert ask(system, user) == (full, None)
    with pytest.raises(openai.NotFoundError, match="cli-token"):
        ask(user, be_id="cli-token")


def test_commands_say_what_is_wrong(server, tmp_path):
    remote = ("--url", server.url, "--api-key", "wrong")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"junk")
    assert "403" in be_serve("list", *remote, status=2)
    assert "422" in be_serve("register", str(junk), "--url", server.url, "--api-key", ADMIN_KEY, status=2)
    assert "No answer" in be_serve("list", "--url", "http://127.0.0.1:9", "--api-key", "k", status=2)
    assert "No token file" in be_serve("register", str(tmp_path / "none"), *remote, status=2)
    assert "404" in be_serve("remove", "nobody", "--url", server.url, "--api-key", ADMIN_KEY, status=2)
