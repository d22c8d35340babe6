"""Resident rows on a real engine: two tokens on one pair of rows, what clients cannot reach, what comes back."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from be_serve.registry import Registry
from tests.integration.conftest import KEY, PROMPT, chat, post, text
from tests.integration.servers import ADMIN_KEY, MODEL, Server, be_serve

pytestmark = [pytest.mark.server, pytest.mark.model]

WORDS = "The gulls cry over the harbor wall, and the tide turns slowly. " * 12
QUESTIONS = ["Who are you, and what do you do?", "What do you love most?", "Tell me about your day."]
VOICES = {
    "one": "You are Captain Barnacle, a grumpy old pirate of the seven seas.",
    "two": "You are Ada, a mathematician in London who loves engines.",
    "three": "You are Pierre, a French cook in Paris who sings about soup.",
}
K = 12


@pytest.fixture(scope="module")
def tight(tmp_path_factory, make_real_token, embedding, tokenizer):
    """A server with rows for one token, three such tokens, and one request at a time.

    One at a time, for requests that share a batch may round differently.
    """
    folder = tmp_path_factory.mktemp("rows")
    command = be_serve(
        "--be-injection=resident-rows",
        f"--be-rows={K}",
        f"--be-registry=sqlite:///{folder / 'registry.db'}",
        "--max-num-seqs=1",
        "--enable-prompt-tokens-details",
    )
    with Server(command, folder / "log", {"BE_ADMIN_KEY": ADMIN_KEY, "VLLM_SERVER_DEV_MODE": "1"}) as running:
        for name, voice in VOICES.items():
            ids = tokenizer.encode(voice, add_special_tokens=False)[:K]
            assert len(ids) == K
            token = make_real_token(name, embedding[ids], prompt=voice)
            assert httpx.post(f"{running.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY).status_code == 201
        yield running


def ask(server, question, **options):
    read = [{"role": "user", "content": f"Read this: {WORDS}"}, {"role": "assistant", "content": "I read it."}]
    return chat(server, [*read, {"role": "user", "content": question}], max_tokens=16, **options)


def test_tokens_that_take_turns_on_the_same_rows_answer_as_each_does_alone(tight):
    """The same ids of the same rows for both, so KV blocks of one must never serve the other."""
    names = ("one", "two", "three", None)
    jobs = [(question, name) for question in QUESTIONS for name in names]
    named = [(question, {"be_id": name} if name else {}) for question, name in jobs]
    alone = {}
    for name in names:  # one token after the other: nothing is rewritten within
        for job, (question, options) in zip(jobs, named, strict=True):
            if job[1] == name:
                alone[job] = text(ask(tight, question, **options))
    assert len({alone[QUESTIONS[0], name] for name in names}) == len(names)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = list(pool.map(lambda job: text(ask(tight, job[0], **job[1])), named))
            assert answers == [alone[job] for job in jobs]
    writes = httpx.get(f"{tight.url}/metrics").text
    assert "be_serve_row_writes_total" in writes


def test_a_token_with_more_vectors_than_rows_is_refused(tight, identity_token):
    """When it is registered, and when it is used: a larger server may have registered it."""
    big = identity_token.to_bytes()
    registered = httpx.post(f"{tight.url}/v1/be/tokens", content=big, headers=KEY)
    Registry(f"sqlite:///{tight.log.parent / 'registry.db'}").put(big, match=True)
    deadline = time.monotonic() + 5
    while httpx.get(f"{tight.url}/v1/be/tokens/identity", headers=KEY).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    used = chat(tight, [{"role": "user", "content": "Hi"}], be_id="identity")
    for answer in (registered, used):
        assert answer.status_code == 422
        assert f"{K} rows" in answer.json()["error"]["message"]
        assert f"{identity_token.manifest.k} vectors" in answer.json()["error"]["message"]
    matched = chat(tight, [{"role": "system", "content": PROMPT}, {"role": "user", "content": "Hi"}])
    assert matched.status_code == 200  # the full prompt itself answers


def test_clients_cannot_name_a_row(tight):
    """Rows lie above every id that vLLM lets through, on every endpoint that takes ids."""
    first = 49152 + 1024
    for row in (first, first + 1, first + K + 1):
        for path, body in (
            ("/v1/completions", {"prompt": [1, row, 2], "max_tokens": 1}),
            ("/inference/v1/generate", {"token_ids": [1, row, 2], "sampling_params": {"max_tokens": 1}}),
            ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "logit_bias": {str(row): 100}}),
            ("/v1/completions", {"prompt": "Hi", "max_tokens": 1, "allowed_token_ids": [row]}),
        ):
            answer = post(tight, path, model=MODEL, **body)
            assert 400 <= answer.status_code < 500, (path, body, answer.text)
        post(tight, "/detokenize", model=MODEL, tokens=[row])
    counted = post(tight, "/tokenize", model=MODEL, messages=[{"role": "user", "content": "Hi"}], be_id="one").json()
    assert max(counted["tokens"]) < first
    assert httpx.get(f"{tight.url}/health").status_code == 200


def test_penalties_do_not_count_rows(tight):
    """A penalty on repetition reads the prompt's ids; a row's is above every counter."""
    answers = [
        text(ask(tight, QUESTIONS[0], be_id="one", repetition_penalty=1.3, presence_penalty=0.5)) for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert httpx.get(f"{tight.url}/health").status_code == 200


def test_a_conversation_finds_its_blocks_as_with_a_plain_system_prompt(tight, tokenizer):
    """Six turns: what the prefix cache serves is what it serves to a system prompt of as many tokens."""
    system = VOICES["one"]
    system = tokenizer.decode(tokenizer.encode(system, add_special_tokens=False)[:K])
    assert len(tokenizer.encode(system, add_special_tokens=False)) == K

    def cached(history, **options):
        answer = chat(tight, history, max_tokens=1, **options).json()
        return answer["usage"]["prompt_tokens"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    history = []
    for turn in range(6):
        history.append({"role": "user", "content": f"{WORDS[: 400 + turn]} Turn {turn}."})
        plain = cached([{"role": "system", "content": system}, *history])
        token = cached(history, be_id="one")
        assert token == plain
        history.append({"role": "assistant", "content": f"The tide answers, for the time {turn}."})
    assert token[1] > 256


def test_rows_survive_a_reload_of_the_weights(tight):
    before = text(ask(tight, QUESTIONS[1], be_id="two"))
    answer = httpx.post(f"{tight.url}/collective_rpc", json={"method": "reload_weights"}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert httpx.post(f"{tight.url}/reset_prefix_cache").status_code == 200
    assert text(ask(tight, QUESTIONS[1], be_id="two")) == before


def test_an_aborted_stream_gives_its_rows_back(tight):
    body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTIONS[2]}], "be_id": "one", "stream": True}
    for _ in range(4):
        with httpx.stream("POST", f"{tight.url}/v1/chat/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
    assert ask(tight, QUESTIONS[2], be_id="two").status_code == 200
