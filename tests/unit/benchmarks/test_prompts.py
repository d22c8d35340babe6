"""Texts of exact length, and the token made of embedding rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from be_serve.core.artifact import Token
from be_serve.core.errors import InputError
from be_serve.core.fingerprint import fingerprint_folder
from benchmarks.common.client import ServerClient
from benchmarks.common.prompts import Chat, fit_questions, fit_text, handbook, question_text
from benchmarks.common.tokens import embedding_rows, make_token
from benchmarks.ttft.workload import ARMS, Case, arms_for, request_body
from tests.conftest import make_tokenizer
from tests.unit.benchmarks.fake import MODEL, FakeServer


@pytest.fixture(scope="module")
def count():
    tokenizer = make_tokenizer("chatml")

    async def tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return tokens


@pytest.mark.parametrize("target", [1, 2, 3, 16, 337, 1584, 3000])
async def test_fit_text_hits_the_count_exactly(count, target):
    text = await fit_text(handbook(0), target, count)
    assert await count(text) == target
    assert text == text.strip()


async def test_fit_text_of_too_short_a_text(count):
    with pytest.raises(InputError, match="more than the built-in text"):
        await fit_text("one two", 400, count)


async def test_fit_text_where_no_text_has_that_count():
    async def even(text: str) -> int:
        return 2 * len(text.split())

    with pytest.raises(InputError, match="exactly 7"):
        await fit_text(handbook(0), 7, even)


def test_texts_follow_from_the_seed_and_differ_early():
    assert handbook(1) == handbook(1)
    assert handbook(1) != handbook(2)
    openings = {question_text(0, f"round {n}")[:60] for n in range(200)}
    assert len(openings) == 200
    assert question_text(0, "a") == question_text(0, "a")


async def test_chat_counts_are_the_servers(count):
    async with FakeServer() as fake, ServerClient(fake.url) as client:
        chat = Chat(client, MODEL)
        await chat.prepare()
        assert chat.system_role
        questions = await fit_questions(chat, 26, ["a", "b"], 0)
        assert [await count(q) for q in questions] == [26, 26]
        assert len(set(questions)) == 2
        prompt = await fit_text(handbook(0), 100, chat.prompt_tokens)
        with_prompt, without = await chat.count(prompt, questions[0]), await chat.count("", questions[0])
        assert with_prompt - without == 100


def make_case(**changes) -> Case:
    values = {"prompt": "P", "prompt_tokens": 50, "question_tokens": 9, "template_tokens": 4, "floor": "F", "k": 2}
    return Case(**{**values, "questions": ("Q",), **changes})


async def test_request_bodies():
    async with ServerClient("http://127.0.0.1:9") as client:
        chat = Chat(client, MODEL, {"date_string": "26 Jul 2024"})
        bodies = {
            arm.name: request_body(
                arm, make_case(), "Q", model=MODEL, chat=chat, be_id="x", salt=arm.name, max_tokens=2
            )
            for arm in ARMS
        }
    system = {name: [m["content"] for m in b["messages"] if m["role"] == "system"] for name, b in bodies.items()}
    assert system == {
        "none": [""], "floor_stock": ["F"], "floor": ["F"], "be": [], "full_warm": ["P"], "full_cold": ["P"],
    }  # fmt: skip
    assert [name for name, b in bodies.items() if "be_id" in b] == ["be"]
    # Only the plugin server is asked not to match: stock vLLM is sent nothing of ours.
    assert {name for name, b in bodies.items() if b.get("be_match") is False} == {"floor"}
    assert all(b["chat_template_kwargs"] == {"date_string": "26 Jul 2024"} for b in bodies.values())
    assert {name: make_case().input_tokens(arm) for name, arm in ((a.name, a) for a in ARMS)} == {
        "none": 13, "floor_stock": 15, "floor": 15, "be": 15, "full_warm": 63, "full_cold": 63,
    }  # fmt: skip


async def test_on_one_server_every_plain_arm_switches_matching_off():
    arms = arms_for(plugin_only=True)
    assert [a.name for a in arms] == ["none", "floor", "be", "full_warm", "full_cold"]
    async with ServerClient("http://127.0.0.1:9") as client:
        chat = Chat(client, MODEL)
        chat.system_role = False
        for arm in arms:
            body = request_body(arm, make_case(), "Q", model=MODEL, chat=chat, be_id="x", salt="s", max_tokens=2)
            assert ("be_id" in body) != ("be_match" in body)
            assert [m["role"] for m in body["messages"]] == ["user"]
            expected = {"full": "P\n\nQ", "floor": "F\n\nQ"}.get(arm.content, "Q")
            assert body["messages"][0]["content"] == expected


def test_the_token_holds_the_models_own_rows(tiny_model_dir):
    token = make_token(tiny_model_dir, "tiny", None, [5, 300, 5], "Be kind")
    weights = load_file(tiny_model_dir / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(token.vectors, weights[[5, 300, 5]])
    again = Token.from_bytes(token.to_bytes())
    again.check_model(fingerprint_folder(tiny_model_dir), 32, served="tiny")
    assert again.manifest.k == 3


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_embedding_rows_of_every_dtype(tmp_path, dtype):
    values = np.array([[1.0, -2.5], [0.0, 3.0], [0.125, 65504.0]], dtype=np.float32)
    if dtype == "BF16":
        data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    else:
        data = values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
    entry = {"dtype": dtype, "shape": [3, 2], "data_offsets": [0, len(data)]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    np.testing.assert_array_equal(embedding_rows(tmp_path, [2, 0]), values[[2, 0]])


def test_embedding_rows_in_shards_and_their_refusals(tmp_path):
    save_file({"lm_head.weight": np.zeros((4, 2), np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    save_file({"model.embed_tokens.weight": rows}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"lm_head.weight": "model-00001-of-00002.safetensors"}
    weight_map["model.embed_tokens.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(embedding_rows(tmp_path, [3]), rows[[3]])
    with pytest.raises(InputError, match="outside the 4 rows"):
        embedding_rows(tmp_path, [4])
    save_file({"model.embed_tokens.weight": rows.astype(np.int8)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match="--token"):
        embedding_rows(tmp_path, [0])
    with pytest.raises(InputError, match="no input embedding"):
        embedding_rows(tmp_path / "missing", [0])
