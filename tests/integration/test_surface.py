"""Beyond one token on chat completions: Anthropic messages, several tokens in a slot, the prompt as fallback, n > 1."""

from __future__ import annotations

import json

import httpx
import pytest

from tests.integration.conftest import KEY, PROMPT, chat, post, text
from tests.integration.servers import MODEL

pytestmark = [pytest.mark.server, pytest.mark.model]

USER = [{"role": "user", "content": "What is the sea like today?"}]
FULL = {"role": "system", "content": PROMPT}


def messages(server, chat=USER, **body) -> httpx.Response:
    """One greedy answer of the Messages API."""
    return post(
        server, "/v1/messages", **{"model": MODEL, "max_tokens": 24, "temperature": 0, "messages": chat, **body}
    )


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["content"][0]["text"]


@pytest.fixture(scope="module")
def halves(server, identity_token, make_real_token):
    """The identity token cut in two."""
    vectors = identity_token.vectors
    for name, part in (("first-half", vectors[:3]), ("second-half", vectors[3:])):
        token = make_real_token(name, part, prompt=f"{name} of a prompt")
        answer = httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY)
        assert answer.status_code == 201, answer.text
    return ["first-half", "second-half"]


def test_messages_take_a_token_by_every_name(server):
    full = messages(server, system=PROMPT, be_match=False)
    expected = text(chat(server, [FULL, *USER], be_match=False))
    named = [{"be_id": "identity"}, {"model": f"{MODEL}:identity"}, {"system": PROMPT}]
    answers = [messages(server, **name) for name in named]
    assert [said(answer) for answer in (full, *answers)] == [expected] * 4
    assert [answer.headers["x-be-id"] for answer in answers] == ["identity"] * 3
    assert answers[2].headers["x-be-match"] == "exact"
    assert "x-be-id" not in full.headers
    assert answers[0].json()["usage"] == full.json()["usage"]
    parts = messages(server, system=[{"type": "text", "text": PROMPT}], be_id="identity")
    assert said(parts) == expected
    assert said(messages(server)) != expected


def test_messages_stream_with_a_token(server):
    body = {"model": MODEL, "max_tokens": 24, "temperature": 0, "messages": USER, "be_id": "identity", "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=120) as answer:
        assert answer.headers["x-be-id"] == "identity"
        events = [json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: {")]
    streamed = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert streamed == said(messages(server, be_id="identity"))


def test_count_tokens_counts_k(server):
    def count(**body):
        answer = post(server, "/v1/messages/count_tokens", model=MODEL, messages=USER, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["input_tokens"]

    assert count(be_id="identity") == count(system=PROMPT, be_match=False)
    assert count(be_id="odd") < count(be_id="identity")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"be_id": "nobody"}),
        (400, {"be_id": "Bad Id"}),
        (400, {"be_id": "odd", "system": "Be nice."}),
        (400, {"be_id": "odd", "be_fallback": "half"}),
    ],
)
def test_messages_refuse_in_their_own_shape(server, status, body):
    answer = messages(server, **body)
    assert answer.status_code == status, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_messages_refuse_slips_of_a_name(server, path):
    body = {"model": MODEL, "max_tokens": 4, "messages": USER}
    slips = [{"be-id": "odd"}, *({place: {"be_id": "odd"}} for place in ("metadata", "extra_body"))]
    slips += [{"chat_template_kwargs": {"be_id": "odd"}}, {"vllm_xargs": {"beId": "odd"}}]
    slips += [{"be_id": "odd", "vllm_xargs": {"be_id": "identity"}}]
    for slip in slips:
        answer = post(server, path, **body, **slip)
        assert answer.status_code == 400, (slip, answer.text)
        assert answer.json()["type"] == "error"
        assert "be_id" in answer.json()["error"]["message"]
    assert post(server, path, **body, metadata={"user_id": "7"}, vllm_xargs={"session_id": "s"}).status_code == 200


def test_messages_take_a_token_among_the_custom_parameters(server):
    named = messages(server, vllm_xargs={"be_id": "identity", "session_id": "s"})
    assert named.headers["x-be-id"] == "identity"
    assert said(named) == said(messages(server, be_id="identity"))
    both = messages(server, be_id="identity", vllm_xargs={"be_id": "identity"})
    assert said(both) == said(named)


def test_tokens_stand_in_order_in_one_slot(server, halves):
    whole = chat(server, USER, be_id="identity")
    both = chat(server, USER, be_id=halves)
    assert text(both) == text(whole)
    assert both.json()["usage"]["prompt_tokens"] == whole.json()["usage"]["prompt_tokens"]
    assert both.headers["x-be-id"] == "first-half,second-half"
    assert len(both.headers["x-be-digest"].split(",")) == 2
    assert text(chat(server, USER, be_id=halves[::-1])) != text(whole)
    assert text(chat(server, USER, be_id=["identity"])) == text(whole)
    assert said(messages(server, be_id=halves)) == text(whole)
    own = [{"role": "system", "content": "second-half of a prompt"}, *USER]
    assert text(chat(server, own, be_id=halves)) == text(whole)
    responses = post(
        server, "/v1/responses", model=MODEL, input=USER, be_id=halves, temperature=0, max_output_tokens=24
    )
    assert responses.json()["output"][0]["content"][0]["text"] == text(whole)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"be_id": []}),
        (400, {"be_id": ["odd"] * 9}),
        (400, {"be_id": ["odd", 7]}),
        (404, {"be_id": ["odd", "nobody"]}),
        (400, {"be_id": ["odd", "identity"], "model": f"{MODEL}:odd"}),
    ],
)
def test_lists_that_are_refused(server, status, body):
    assert chat(server, USER, **{"model": MODEL, **body}).status_code == status


def test_tokens_of_other_places_cannot_share_a_slot(server, make_real_token, odd_token):
    token = make_real_token("at-the-front", odd_token.vectors, prompt="front", placement="prefix")
    assert httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY).status_code == 201
    refused = chat(server, USER, be_id=["odd", "at-the-front"])
    assert refused.status_code == 400
    assert "placement" in refused.json()["error"]["message"]


def test_a_conversation_may_change_its_token(server):
    first = text(chat(server, USER, be_id="odd"))
    turns = [*USER, {"role": "assistant", "content": first}, {"role": "user", "content": "And who are you?"}]
    changed = chat(server, turns, be_id="identity")
    assert text(changed) == text(chat(server, [FULL, *turns], be_match=False))


def test_several_answers_of_one_request(server):
    token = chat(server, USER, be_id="identity", n=2, temperature=0.8, seed=3).json()["choices"]
    full = chat(server, [FULL, *USER], be_match=False, n=2, temperature=0.8, seed=3).json()["choices"]
    assert [c["message"]["content"] for c in token] == [c["message"]["content"] for c in full]
    assert len({c["message"]["content"] for c in token}) == 2


@pytest.fixture(scope="module")
def stored(server, identity_token, make_real_token):
    """`lossy`, marked so, and `gone`, removed: both with their prompt stored."""
    for name, quality in (("lossy", {"verdict": {"status": "lossy", "reasons": ["x"]}}), ("gone", {})):
        token = make_real_token(name, identity_token.vectors[::-1].copy(), prompt=PROMPT, quality=quality)
        for answer in (
            httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY),
            httpx.put(f"{server.url}/v1/be/tokens/{name}/prompt", content=PROMPT.encode(), headers=KEY),
        ):
            assert answer.is_success, answer.text
            assert PROMPT not in answer.text
    assert httpx.delete(f"{server.url}/v1/be/tokens/gone", headers=KEY).status_code == 200


@pytest.mark.parametrize("be_id", ["gone", "lossy"])
def test_the_stored_prompt_answers(server, stored, be_id):
    full = text(chat(server, [FULL, *USER], be_match=False))
    answer = chat(server, USER, be_id=be_id, be_fallback="full")
    assert text(answer) == full
    assert answer.headers["x-be-fallback"] == "full"
    assert "x-be-id" not in answer.headers
    assert said(messages(server, be_id=be_id, be_fallback="full")) == full
    assert text(chat(server, [FULL, *USER], be_id=be_id, be_fallback="full")) == full
    appended = chat(
        server,
        [{"role": "system", "content": "Be brief."}, *USER],
        be_id=be_id,
        be_fallback="full",
        be_system="append",
    )
    joined = {"role": "system", "content": f"{PROMPT}\n\nBe brief."}
    assert text(appended) == text(chat(server, [joined, *USER]))


def test_nobody_learns_a_stored_prompt_by_what_is_cached(server, make_real_token, odd_token):
    """Blocks of a stored prompt are found again by the same fallback, and by no chat that spells a guess out."""
    secret = " ".join(f"The {n}th lighthouse keeper likes {n * n} kinds of weather." for n in range(30))
    token = make_real_token("secretive", odd_token.vectors, prompt=secret)
    for answer in (
        httpx.post(f"{server.url}/v1/be/tokens", content=token.to_bytes(), headers=KEY),
        httpx.put(f"{server.url}/v1/be/tokens/secretive/prompt", content=secret.encode(), headers=KEY),
        httpx.delete(f"{server.url}/v1/be/tokens/secretive", headers=KEY),
    ):
        assert answer.is_success, answer.text

    def cached(salt, **body):
        body = {"model": MODEL, "input": "Hi", "max_output_tokens": 1, "cache_salt": salt, **body}
        answer = post(server, "/v1/responses", **body)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["input_tokens_details"]["cached_tokens"]

    assert cached("plain", instructions=secret) == 0
    assert cached("plain", instructions=secret) >= 128  # so one would see it
    fallback = {"be_id": "secretive", "be_fallback": "full"}
    assert cached("s", **fallback) == 0
    assert cached("s", **fallback) >= 128
    assert cached("s", instructions=secret) == 0
    assert cached("s", **fallback, chat_template_kwargs={"bos_token": "x"}) == 0


def test_without_be_fallback_nothing_changes(server, stored):
    assert chat(server, USER, be_id="gone").status_code == 404
    lossy = chat(server, USER, be_id="lossy")
    assert lossy.headers["x-be-id"] == "lossy"


def test_a_marked_token_answers_where_only_its_absence_matters(server, stored):
    lossy = chat(server, USER, be_id="lossy", be_fallback="unavailable")
    assert lossy.headers["x-be-id"] == "lossy"
    assert text(lossy) == text(chat(server, USER, be_id="lossy"))
    gone = chat(server, USER, be_id="gone", be_fallback="unavailable")
    assert gone.headers["x-be-fallback"] == "full"
    assert text(gone) == text(chat(server, [FULL, *USER], be_match=False))


def test_a_token_that_can_answer_does(server):
    answer = chat(server, USER, be_id="identity", be_fallback="full")
    assert answer.headers["x-be-id"] == "identity"
    assert "x-be-fallback" not in answer.headers


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, {"be_id": "nobody", "be_fallback": "full"}),
        (404, {"be_id": "nobody", "be_fallback": "unavailable"}),
        (400, {"be_id": "gone", "be_fallback": True}),
        (400, {"be_id": "gone", "be_fallback": ["full"]}),
        (404, {"be_id": ["gone", "nobody"], "be_fallback": "full"}),
        (400, {"be_id": "gone", "be_fallback": "half"}),
        (400, {"be_fallback": "full"}),
        (400, {"be_id": "lossy", "be_fallback": "full", "prompt_logprobs": 1}),
        (400, {"be_id": "gone", "be_fallback": "full", "messages": [{"role": "system", "content": "No."}, *USER]}),
    ],
)
def test_what_be_fallback_does_not_change(server, stored, status, body):
    assert chat(server, **{"messages": USER, **body}).status_code == status


@pytest.mark.parametrize("be_id", ["gone", "lossy"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"messages": USER, "return_token_strs": True}),
        ("/v1/chat/completions", {"messages": USER, "return_prompt_text": True}),
        ("/v1/chat/completions", {"messages": USER, "return_token_ids": True}),
        ("/v1/chat/completions", {"messages": USER, "prompt_logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": ""}], "echo": True}),
        ("/v1/responses", {"input": USER, "enable_response_messages": True}),
    ],
)
def test_a_stored_prompt_is_never_read_back(server, stored, be_id, path, body):
    answer = post(server, path, model=MODEL, be_id=be_id, be_fallback="full", **body)
    assert answer.status_code == 400, answer.text
    assert PROMPT.split(".")[0] not in answer.text


def test_only_the_tokens_own_prompt_is_stored(server, stored):
    def put(name, content, headers=KEY):
        return httpx.put(f"{server.url}/v1/be/tokens/{name}/prompt", content=content, headers=headers).status_code

    assert put("lossy", b"Another prompt.") == 422
    assert put("lossy", b"\xff\xfe\xfd") == 422
    assert put("nobody", PROMPT.encode()) == 404
    assert put("fixed", PROMPT.encode()) == 409
    assert put("lossy", PROMPT.encode(), headers={}) == 401


def test_a_stored_prompt_can_be_forgotten(server, stored, identity_token, make_real_token):
    url = f"{server.url}/v1/be/tokens"
    token = make_real_token("private", identity_token.vectors, prompt=PROMPT)
    assert httpx.post(url, content=token.to_bytes(), headers=KEY).json()["fallback"] is False
    assert httpx.put(f"{url}/private/prompt", content=PROMPT.encode(), headers=KEY).json()["fallback"] is True
    assert httpx.delete(f"{url}/private?prompt=true", headers=KEY).status_code == 200
    assert chat(server, USER, be_id="private", be_fallback="full").status_code == 404
    assert httpx.delete(f"{url}/private?prompt=true", headers=KEY).status_code == 404
