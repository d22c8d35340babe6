"""The clock around a streamed chat, against a socket that sends known bytes at known times."""

from __future__ import annotations

import json

import pytest

from be_serve.core.errors import ServerError
from benchmarks.common.client import ServerClient, server_message
from tests.unit.benchmarks.fake import MODEL, FakeServer

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "cache_salt": "s"}


def event(**data) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def delta(**content) -> bytes:
    return event(choices=[{"delta": content}])


DONE = b"data: [DONE]\n\n"


async def test_ttft_is_the_first_event_with_content_not_the_role():
    role, first, second = delta(role="assistant", content=""), delta(content="a"), delta(content="b")
    usage = event(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 2})
    # Every piece is followed by a pause of 2 ms, so the role event comes at least 10 ms before the content.
    script = [role, *[b": keep-alive\n\n"] * 4, first, second, usage, DONE]
    async with FakeServer(script=script) as fake, ServerClient(fake.url) as client:
        sample = await client.chat(BODY)
    assert sample.ok
    assert sample.text == "ab"
    assert sample.ttft >= 0.010
    assert sample.ttft < sample.e2e
    assert len(sample.itls) == 1
    assert (sample.prompt_tokens, sample.completion_tokens, sample.cached_tokens) == (7, 2, None)


async def test_events_cut_anywhere_are_put_together():
    whole = delta(content="héllo ") + delta(content="wörld") + event(
        choices=[], usage={"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
    ) + DONE  # fmt: skip
    pieces = [whole[i : i + 5] for i in range(0, len(whole), 5)]
    async with FakeServer(script=pieces) as fake, ServerClient(fake.url) as client:
        sample = await client.chat(BODY)
    assert sample.ok
    assert sample.text == "héllo wörld"
    assert sample.cached_tokens == 2


async def test_reasoning_counts_as_content():
    async with FakeServer(script=[delta(reasoning="hm"), DONE]) as fake, ServerClient(fake.url) as client:
        assert (await client.chat(BODY)).text == "hm"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([delta(content="a")], "before [DONE]"),
        ([delta(role="assistant", content=""), DONE], "no content"),
        ([event(error={"message": "engine is dead"})], "engine is dead"),
        ([b"data: {broken\n\n", DONE], "JSONDecodeError"),
    ],
)
async def test_a_faulty_stream_is_a_failed_sample(script, message):
    async with FakeServer(script=script) as fake, ServerClient(fake.url) as client:
        sample = await client.chat(BODY)
    assert not sample.ok
    assert message in sample.error


async def test_a_refusal_keeps_the_servers_message():
    async with FakeServer(fail={0: (404, "No token 'x'.")}) as fake, ServerClient(fake.url) as client:
        sample = await client.chat(BODY)
        assert sample.error == "HTTP 404: No token 'x'."
        with pytest.raises(ServerError, match="404: Not Found"):
            await client.call("GET", "/nowhere")


async def test_one_connection_serves_all_requests():
    async with FakeServer() as fake, ServerClient(fake.url + "/v1/") as client:
        for _ in range(3):
            assert await client.healthy()
            assert (await client.chat(BODY)).ok
        assert fake.connections == 1


async def test_no_server():
    async with ServerClient("http://127.0.0.1:9") as client:
        assert not await client.healthy()
        assert (await client.chat(BODY)).error.startswith("ConnectError")
        with pytest.raises(ServerError, match="failed"):
            await client.model_id()


async def test_the_base_model_is_found_among_aliases():
    async with FakeServer(plugin=True) as fake, ServerClient(fake.url) as client:
        assert await client.model_id() == MODEL
        assert await client.version() == "0.32.0"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long", "code": 400}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (b"", "(empty body)"),
        (b"[1]", "[1]"),
    ],
)
def test_server_message(body, message):
    assert server_message(body) == message
