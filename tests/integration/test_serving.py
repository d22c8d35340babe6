"""Chat with a token through the OpenAI API of a real vLLM server."""

from __future__ import annotations

import json

import httpx
import pytest

from be_serve.core.errors import InputError
from tests.integration.conftest import KEY, PROMPT, chat, post, text
from tests.integration.servers import MODEL
from trainer.data.chat_server import answered
from trainer.data.queries import Query

pytestmark = [pytest.mark.server, pytest.mark.model]

USER = [{"role": "user", "content": "What is the sea like today?"}]
TURNS = [
    *USER,
    {"role": "assistant", "content": "Rough, matey."},
    {"role": "user", "content": "And who are you?"},
]
FULL = {"role": "system", "content": PROMPT}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("messages", [USER, TURNS])
def test_identity_token_is_the_full_prompt(server, messages):
    full = chat(server, [FULL, *messages], be_match=False)
    token = chat(server, messages, be_id="identity")
    assert text(token) == text(full)
    assert token.json()["usage"] == full.json()["usage"]
    assert "x-be-id" not in full.headers
    assert text(token) != text(chat(server, messages))


def test_every_way_to_name_it_gives_the_same_answer(server, identity_token):
    by_id = chat(server, USER, be_id="identity")
    alias = chat(server, USER, model=f"{MODEL}:identity")
    match = chat(server, [FULL, *USER])
    same_system = chat(server, [FULL, *USER], be_id="identity")
    empty_system = chat(server, [{"role": "system", "content": ""}, *USER], be_id="identity")
    assert len({text(r) for r in (by_id, alias, match, same_system, empty_system)}) == 1
    for response in (by_id, alias, match):
        assert response.headers["x-be-id"] == "identity"
        assert len(response.headers["x-be-digest"]) == 64
        assert response.json()["model"] == MODEL
    assert match.headers["x-be-match"] == "exact"
    assert "x-be-match" not in by_id.headers


def test_usage_counts_k(server):
    with_token = chat(server, USER, be_id="odd").json()["usage"]["prompt_tokens"]
    without = chat(server, [{"role": "system", "content": ""}, *USER]).json()["usage"]["prompt_tokens"]
    assert with_token == without + 2
    assert text(chat(server, USER, be_id="fixed")) == text(chat(server, USER, be_id="odd"))


def test_append_is_the_concatenated_prompt(server):
    full = chat(server, [{"role": "system", "content": f"{PROMPT}\n\nBe brief."}, *USER])
    appended = chat(server, [{"role": "system", "content": "Be brief."}, *USER], be_id="identity", be_system="append")
    assert text(appended) == text(full)


def test_openai_sdk(client):
    options = {
        "model": MODEL,
        "messages": USER,
        "temperature": 0,
        "max_tokens": 24,
        "extra_body": {"be_id": "identity"},
    }
    whole = client.chat.completions.create(**options)
    answer = whole.choices[0].message.content
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer
    counted = [
        {n: getattr(u, n) for n in ("prompt_tokens", "completion_tokens")} for u in (chunks[-1].usage, whole.usage)
    ]
    assert counted[0] == counted[1]
    two = client.chat.completions.create(**{**options, "temperature": 0.9}, n=2, logprobs=True, top_logprobs=2)
    assert len(two.choices) == 2
    assert all(len(c.logprobs.content[0].top_logprobs) == 2 for c in two.choices)
    stopped = client.chat.completions.create(**options, stop=answer.split()[1])
    assert stopped.choices[0].finish_reason == "stop"
    assert len(stopped.choices[0].message.content) < len(answer)
    response = client.responses.create(
        model=MODEL, input=USER[0]["content"], temperature=0, max_output_tokens=24, extra_body={"be_id": "identity"}
    )
    assert response.output_text == answer
    events = list(
        client.responses.create(
            model=MODEL,
            input=USER[0]["content"],
            temperature=0,
            max_output_tokens=24,
            stream=True,
            extra_body={"be_id": "identity"},
        )
    )
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer
    aliases = {m.id for m in client.models.list() if m.to_dict().get("parent") == MODEL}
    assert aliases == {f"{MODEL}:{i}" for i in ("identity", "odd", "fixed")}


def test_responses_instructions_match_and_conflict(server):
    body = {"model": MODEL, "input": USER[0]["content"], "temperature": 0, "max_output_tokens": 16}
    matched = post(server, "/v1/responses", **body, instructions=PROMPT)
    assert matched.headers["x-be-match"] == "exact"
    named = post(server, "/v1/responses", **body, be_id="identity")
    assert matched.json()["output"][0]["content"] == named.json()["output"][0]["content"]
    assert post(server, "/v1/responses", **body, instructions="Be nice.", be_id="identity").status_code == 400


def test_batch_chat(server):
    body = {"model": MODEL, "messages": [USER, TURNS], "temperature": 0, "max_tokens": 16}
    batch = post(server, "/v1/chat/completions/batch", **body, be_id="identity").json()
    answers = [choice["message"]["content"] for choice in batch["choices"]]
    assert answers == [text(chat(server, m, be_id="identity", max_tokens=16)) for m in (USER, TURNS)]


def test_tokenize_counts_k(server, tokenizer):
    tokens = post(server, "/tokenize", model=MODEL, messages=USER, be_id="odd").json()
    plain = post(server, "/tokenize", model=MODEL, messages=[{"role": "system", "content": ""}, *USER]).json()
    assert tokens["count"] == plain["count"] + 2
    at = plain["tokens"].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert tokens["tokens"] == [*plain["tokens"][:at], 0, 0, *plain["tokens"][at:]]


def test_tools_and_structured_output(server):
    schema = {"type": "object", "properties": {"mood": {"enum": ["good", "bad"]}}, "required": ["mood"]}
    answer = chat(
        server,
        USER,
        be_id="identity",
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}},
    )
    assert json.loads(text(answer))["mood"] in ("good", "bad")
    forced = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tools": [WEATHER], "tool_choice": forced, "max_tokens": 60}
    full = chat(server, [FULL, *USER], be_match=False, **options).json()["choices"][0]["message"]["tool_calls"]
    token = chat(server, USER, be_id="identity", **options).json()["choices"][0]["message"]["tool_calls"]
    assert token[0]["function"] == full[0]["function"]
    assert token[0]["function"]["name"] == "get_weather"


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"be_id": "nobody"}),
        (400, {"be_id": ""}),
        (400, {"be_id": "Bad Id"}),
        (400, {"be_id": 7}),
        (400, {"model": f"{MODEL}:odd", "be_id": "identity"}),
        (404, {"model": f"{MODEL}:nobody"}),
        (400, {"model": f"{MODEL}:Bad Id"}),
        (404, {"model": "nothing:identity"}),
        (400, {"be_id": "odd", "be_system": "replace"}),
        (400, {"be_id": "odd", "be_match": "yes"}),
        (400, {"be_system": "append"}),
        (400, {"be_id": "odd", "messages": [{"role": "system", "content": "Be nice."}, *USER]}),
        (400, {"be_id": "odd", "messages": [*USER, {"role": "system", "content": "Be nice."}]}),
        (400, {"be_id": "odd", "prompt_logprobs": 1}),
        (400, {"be_id": "odd", "echo": True}),
        (400, {"be_id": "odd", "use_beam_search": True}),
        (400, {"be_id": "odd", "truncate_prompt_tokens": 5}),
        (400, {"be_id": "odd", "chat_template": "{{ messages }}"}),
        (400, {"be_id": "odd", "kv_transfer_params": {"prompt_token_ids": [1, 2, 3]}}),
        (400, {"be_id": "odd", "messages": [{"role": "user", "content": "word " * 5000}]}),
        (400, {"be_id": "odd", "messages": [{"role": "user", "content": "x" * 3_000_000}]}),
        (400, {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}]}),
    ],
)
def test_refusals(server, status, body):
    response = post(server, "/v1/chat/completions", **{"model": MODEL, "messages": USER, "max_tokens": 4, **body})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["code"] == status
    assert "x-be-id" not in response.headers or status == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "be_id": "odd"}),
        ("/v1/completions", {"prompt": "hi", "model": f"{MODEL}:odd"}),
        ("/v1/chat/completions/render", {"messages": USER, "be_id": "odd"}),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {}, "be_id": "odd"}),
        ("/generative_scoring", {"query": "a", "items": ["b"], "be_id": "odd"}),
        ("/v1/completions", {"prompt": [49152]}),
        ("/v1/completions", {"prompt_embeds": "AAAA"}),
    ],
)
def test_other_endpoints_refuse(server, path, body):
    response = post(server, path, **{"model": MODEL, "max_tokens": 4, **body})
    assert response.status_code == 400, response.text
    if "be_id" in body or "model" in body:
        assert "cannot use a token" in response.json()["error"]["message"]


SLIPS = [
    ({"be-id": "odd"}, "be-id"),
    ({"BE_ID": "odd"}, "BE_ID"),
    ({"be_ids": ["odd"]}, "be_ids"),
    ({"beid": "odd", "be_system": "append"}, "beid"),
    ({"be_id": "odd", "be_fallbac": "full"}, "be_fallbac"),
    ({"extra_body": {"be_id": "odd"}}, "extra_body.be_id"),
    ({"metadata": {"be_id": "odd"}}, "metadata.be_id"),
    ({"chat_template_kwargs": {"be_id": "odd"}}, "chat_template_kwargs.be_id"),
    ({"vllm_xargs": {"Be-Id": "odd"}}, "vllm_xargs.Be-Id"),
]
XARGS = ({"vllm_xargs": {"be_id": "odd"}}, "vllm_xargs.be_id")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/chat/completions/batch", {"messages": [USER, TURNS]}),
        ("/v1/responses", {"input": "What is the sea like?"}),
        ("/tokenize", {"messages": USER}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions/render", {"messages": USER}),
        ("/inference/v1/generate", {"token_ids": [1, 2], "sampling_params": {}}),
        ("/generative_scoring", {"query": "a", "items": ["b"]}),
        ("/tokenize", {"prompt": "hi"}),
    ],
)
def test_a_misplaced_or_misspelt_name_is_refused(server, path, body):
    """Answered, it would be answered without any system prompt."""
    for slip, key in (*SLIPS, XARGS):
        response = post(server, path, **{"model": MODEL, **body, **slip})
        assert response.status_code == 400, (slip, response.text)
        error = response.json()["error"]
        assert error["message"]
        if path == "/v1/chat/completions":
            assert error["param"] == key
            assert f"`{key}` is not read; send `be_" in error["message"]
            assert "at the top level" in error["message"]


def test_keys_of_others_pass(server):
    body = {"metadata": {"user_id": "7", "id": "x"}, "id": 7, "seed": 3, "beta_id": "x", "extra_body": {"top_k": 1}}
    asked = {"vllm_xargs": {"session_id": "s"}, "chat_template_kwargs": {"system_id": "x"}, **body}
    assert text(chat(server, USER, be_id="identity", **asked)) == text(chat(server, USER, be_id="identity", seed=3))
    for value in (None, {}):
        assert chat(server, USER, metadata=value, vllm_xargs=value, chat_template_kwargs=value).status_code == 200
    for value in ("be_id", ["be_id"], 7):
        assert chat(server, USER, extra_body=value).status_code == 200
        assert post(server, "/v1/completions", model=MODEL, prompt="hi", max_tokens=1, extra_body=value).is_success
    assert post(server, "/v1/completions", model=MODEL, prompt="hi", max_tokens=1, **body).status_code == 200


def test_tokens_change_without_restart(server, odd_token, make_real_token):
    def register(token, query=""):
        return httpx.post(f"{server.url}/v1/be/tokens{query}", content=token.to_bytes(), headers=KEY)

    first = make_real_token("hot", odd_token.vectors, prompt="hot")
    assert register(first).status_code == 201
    before = chat(server, USER, be_id="hot")
    assert register(first).status_code == 200
    second = make_real_token("hot", odd_token.vectors[::-1] * 0.2, prompt="hot")
    assert register(second).status_code == 409
    assert text(chat(server, USER, be_id="hot")) == text(before)
    assert register(second, "?replace=true").json()["version"] == 2
    after = chat(server, USER, be_id="hot")
    assert after.headers["x-be-digest"] != before.headers["x-be-digest"]
    assert httpx.delete(f"{server.url}/v1/be/tokens/hot", headers=KEY).status_code == 200
    assert chat(server, USER, be_id="hot").status_code == 404


def test_a_token_of_another_model_is_refused(server, odd_token):
    manifest = odd_token.manifest
    fingerprint = manifest.base_model.fingerprint.model_copy(update={"embedding": "0" * 16})
    stranger = type(odd_token)(
        manifest.model_copy(
            update={"id": "stranger", "base_model": manifest.base_model.model_copy(update={"fingerprint": fingerprint})}
        ),
        odd_token.vectors,
    )
    response = httpx.post(f"{server.url}/v1/be/tokens", content=stranger.to_bytes(), headers=KEY)
    assert response.status_code == 422
    assert str(fingerprint) in response.text
    assert str(manifest.base_model.fingerprint) in response.text


@pytest.mark.parametrize("extra", [{}, {"be_id": "identity"}])
def test_seeded_sampling_survives_a_split_prefill(server, extra):
    """Stock vLLM's CPU engine dies of this request; ours answers it, and the seed holds."""
    long = [{"role": "user", "content": "The sea is wide and deep. " * 200 + "What did I say?"}]
    answers = [
        text(chat(server, long, seed=5, temperature=1.0, max_tokens=12, cache_salt=f"salt-{i}", **extra))
        for i in range(2)
    ]
    assert answers[0] == answers[1]
    plain = post(server, "/v1/completions", model=MODEL, prompt="The sea is wide. " * 300, seed=3, temperature=1.0)
    assert plain.status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_prefix_cache_serves_a_token_and_keeps_tokens_apart(server):
    """vLLM hashes the vectors' bytes into each block: the same token hits, another one never does."""
    turns = [{"role": "user", "content": "The gulls cry over the harbor wall. " * 60}]

    def cached(be_id, messages):
        return chat(server, messages, be_id=be_id, max_tokens=4).json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]

    assert cached("odd", turns) == 0
    seen = cached("odd", turns)
    assert seen >= 256
    assert cached("identity", turns) == 0
    more = [*turns, {"role": "assistant", "content": "They do."}, {"role": "user", "content": "Why?"}]
    assert cached("odd", more) >= seen


def test_a_server_can_write_the_teachers_responses(server):
    """The full prompt's own answers, though a token is registered to match that prompt."""
    queries = [Query(({"role": "user", "content": words},)) for words in ("Who are you?", "What is the sea like?")]
    # One at a time: requests that share a batch may round differently.
    options = {"url": f"{server.url}/v1", "model": MODEL, "max_tokens": 12, "stop": ["."]}
    found = [answered([query], PROMPT, **options)[0] for query in queries]
    for query, known in zip(found, queries, strict=True):
        system = {"role": "system", "content": PROMPT}
        full = chat(
            server,
            [system, *known.messages],
            be_match=False,
            max_tokens=12,
            stop=["."],
            include_stop_str_in_output=True,
        )
        assert query.messages == known.messages
        assert query.answer == text(full)
    with pytest.raises(InputError, match="404"):
        answered(queries, PROMPT, url=server.url, model="unknown", max_tokens=4)
    with pytest.raises(InputError, match="No answer"):
        answered(queries, PROMPT, url="http://127.0.0.1:9", model=MODEL, max_tokens=4)


def test_metrics_and_openapi(server):
    chat(server, USER, be_id="identity")
    lines = httpx.get(f"{server.url}/metrics").text
    for name in (
        "be_serve_requests_total",
        "be_serve_injection_seconds_count",
        "be_serve_injection_cpu_seconds_count",
        "be_serve_registry_lookups_total",
        "be_serve_refusals_total",
        "be_serve_tokens",
        "be_serve_inflight_bytes",
    ):
        assert name in lines
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert "post" in paths["/v1/be/tokens"]
    assert "delete" in paths["/v1/be/tokens/{be_id}"]


PLAIN = [
    ("/v1/chat/completions", {"messages": USER}),
    ("/v1/chat/completions", {"messages": [FULL, *TURNS], "be_match": False}),
    ("/v1/chat/completions", {"messages": USER, "logprobs": True, "top_logprobs": 3}),
    ("/v1/chat/completions", {"messages": USER, "tools": [WEATHER]}),
    ("/v1/chat/completions", {"messages": USER, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"messages": USER, "prompt_logprobs": 1}),
    ("/v1/chat/completions/batch", {"messages": [USER, TURNS]}),
    ("/v1/completions", {"prompt": "The sea is"}),
    ("/v1/responses", {"input": "What is the sea like?", "max_output_tokens": 16}),
    ("/v1/messages", {"messages": USER}),
    ("/tokenize", {"messages": [FULL, *TURNS], "be_match": False}),
    ("/v1/chat/completions", {"messages": USER, "temperature": -1}),
    ("/v1/chat/completions", {"messages": USER, "model": "unknown"}),
]


@pytest.mark.parametrize(("path", "body"), PLAIN)
def test_plain_requests_are_answered_as_without_the_plugin(server, stock, path, body):
    body = {"model": MODEL, "temperature": 0, "max_tokens": 16, **body}
    ours, theirs = post(server, path, **body), post(stock, path, **body)
    assert ours.status_code == theirs.status_code
    assert _stripped(ours.text) == _stripped(theirs.text)
    assert not [h for h in ours.headers if h.startswith("x-be-")]


def _stripped(body: str) -> list:
    """The body's JSON, or its SSE events', without ids and times."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in _VARYING}
        return [strip(v) for v in value] if isinstance(value, list) else value

    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    if not events:
        return [strip(json.loads(body))]
    return _joined([strip(json.loads(event)) for event in events if event != "[DONE]"]) + events[-1:]


def _joined(chunks: list[dict]) -> list:
    """A stream's chunks with their text joined: a busy server puts several tokens into one chunk."""
    text, rest = "", []
    for chunk in chunks:
        for choice in chunk["choices"]:
            text += choice["delta"].pop("content", None) or ""
        if not chunk["choices"] or any(c["delta"] or c["finish_reason"] for c in chunk["choices"]):
            rest.append(chunk)
    return [*rest, text]


# `system_fingerprint` names the server's configuration, and the engine's flags do differ.
_VARYING = {"id", "created", "created_at", "request_id", "item_id", "system_fingerprint"}
