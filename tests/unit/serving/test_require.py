"""--be-require: no chat is answered without a token."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from be_serve.core.errors import (
    NotAuthenticated,
    OverBudget,
    RegistryError,
    RequestError,
    RowsBusy,
    TokenNotFound,
    TokenRequired,
    TooLarge,
    TooManyVectors,
    UnsupportedRequest,
)
from be_serve.serving import routes
from be_serve.serving.injection.resident_rows import ResidentRows
from be_serve.serving.injection.row_pool import RowPool
from be_serve.serving.metrics import metrics
from be_serve.serving.middleware import SUPPORTED, TOKENLESS, BEMiddleware
from be_serve.serving.settings import Settings
from tests.factories import PROMPT
from tests.unit.serving.hooks import FULL, USER, make_hook, request

OTHER = [{"role": "system", "content": "Be nice."}, *USER]
# POST routes of vLLM that answer no prompt: they steer the server, or turn text and ids into one another.
HARMLESS = [
    "/abort_requests",
    "/collective_rpc",
    "/detokenize",
    "/fault_tolerance/apply",
    "/finish_weight_update",
    "/inference/v1/abort_requests",
    "/init_weight_transfer_engine",
    "/is_scaling_elastic_ep",
    "/pause",
    "/ping",
    "/release_kv_cache_memory",
    "/reset_encoder_cache",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/resume",
    "/scale_elastic_ep",
    "/shutdown_weight_transfer_engine",
    "/sleep",
    "/start_draft_weight_update",
    "/start_profile",
    "/start_weight_update",
    "/stop_profile",
    "/update_weight_version",
    "/update_weights",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/v1/load_lora_adapter",
    "/v1/responses/{response_id}/cancel",
    "/v1/unload_lora_adapter",
    "/wake_up",
    "/weight_checker",
]
# They write down speech, or give vectors and scores: nothing there is a chat.
NO_CHAT = [
    "/classify",
    "/pooling",
    "/rerank",
    "/score",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v2/embed",
    "/v2/rerank",
]


@pytest.mark.parametrize("path", sorted(SUPPORTED))
async def test_a_chat_without_a_token_is_refused(tmp_path, context, path):
    context.path = path
    hook, _, _ = make_hook(tmp_path, require=True)
    for fields, chat in (
        ({}, USER),
        ({}, OTHER),
        ({"be_id": None}, USER),
        ({"be_match": False}, FULL),
        ({"model": "my-lora"}, USER),
    ):
        with pytest.raises(TokenRequired) as caught:
            await hook.begin(request(**fields), chat, None)
        assert caught.value.http_status == 403
        for word in ("`be_id`", "`<model>:<id>`", "gateway"):
            assert word in caught.value.message
    for fields, chat in (({"be_id": "harbor"}, USER), ({"model": "tiny:harbor"}, USER), ({}, FULL)):
        assert (await hook.begin(request(**fields), chat, None)).tokens.name == "harbor"
    with pytest.raises(TokenNotFound):
        await hook.begin(request(be_id="nobody"), USER, None)


async def test_what_answers_in_a_tokens_place_passes(tmp_path, context):
    hook, index, registry = make_hook(tmp_path, require=True)
    registry.store_prompt("harbor", PROMPT)
    crowded, _, _ = make_hook(
        tmp_path / "crowded", injection=ResidentRows(RowPool(range(1), None), 50_000), require=True
    )
    assert await crowded.begin(request(), FULL, None) is None  # matched, without room: its own full prompt answers
    registry.remove("harbor")
    index.refresh()
    answered = await hook.begin(request(be_id="harbor", be_fallback="full"), USER, None)
    assert answered.messages == FULL
    with pytest.raises(RequestError, match="needs a `be_id`"):
        await hook.begin(request(be_fallback="full"), USER, None)
    with pytest.raises(TokenRequired):
        await hook.begin(request(model="my-lora", be_fallback="full"), USER, None)


@pytest.mark.parametrize(
    "option",
    [
        {"truncate_prompt_tokens": 3},
        {"kv_transfer_params": {"prompt_token_ids": [1, 2]}},
        {"prompt_logprobs": 0},
        {"echo": True},
        {"use_beam_search": True},
        {"chat_template": "{{ messages[-1].content }}"},
        {"background": True},
    ],
)
async def test_an_option_that_rules_tokens_out_is_refused_for_a_match(tmp_path, context, option):
    """Answered plainly, vLLM could cut the prompt away, and nothing would stand in its place."""
    for require in (True, False):
        hook, _, _ = make_hook(tmp_path / str(require), require=require)
        asked = request()
        for name, value in option.items():
            setattr(asked, name, value)
        if require:
            with pytest.raises(UnsupportedRequest):
                await hook.begin(asked, FULL, None)
            assert "x-be-id" not in context.headers
        else:
            assert await hook.begin(asked, FULL, None) is None


async def test_a_match_gives_way_for_want_of_room_alone(tmp_path, context):
    hook, _, _ = make_hook(tmp_path, require=True)
    for full in (OverBudget("x"), RowsBusy("x"), TooLarge("x"), TooManyVectors("x")):
        matched = await hook.begin(request(), FULL, None)
        assert (await hook.on_unavailable(matched, full)).messages == FULL
    for cut in (UnsupportedRequest("vLLM truncated the chat"), RegistryError("x")):
        matched = await hook.begin(request(), FULL, None)
        with pytest.raises(type(cut)):
            await hook.on_unavailable(matched, cut)


async def test_a_chat_on_an_endpoint_unknown_to_us_is_refused(tmp_path, context):
    context.path = "/v9/chat"
    hook, _, _ = make_hook(tmp_path, require=True)
    with pytest.raises(TokenRequired):
        await hook.begin(request(), USER, None)


async def test_tokenize_needs_the_api_key_for_every_chat(tmp_path, context):
    hook, _, _ = make_hook(tmp_path, keys=["k1"], require=True)
    context.path = "/tokenize"
    for asked in (request(), request(model="tiny:harbor")):
        with pytest.raises(NotAuthenticated):
            await hook.begin(asked, USER, None)


def test_endpoints_that_take_no_token_are_refused_whole():
    app = FastAPI()
    paths = [*sorted(TOKENLESS), "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/v1/chat/completions"]
    for path in paths:
        app.post(path)(lambda: "answered")
    options = {"base_models": lambda: ["tiny"], "metrics": metrics, "is_route": partial(routes.is_post_route, app)}
    app.add_middleware(BEMiddleware, **options, require=True)
    http = TestClient(app)
    for path in paths:
        for headers in ({}, {"content-type": "multipart/form-data"}):
            answer = http.post(path, content=b'{"prompt": "hi"}', headers=headers)
            assert answer.status_code == (403 if path in TOKENLESS else 200), path
            if path in TOKENLESS:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("TokenRequired", 403)
                assert f"{path} cannot use one. Use one of: " in error["message"]
                assert "--be-require" in error["message"]
    named = http.post("/v1/completions", json={"be_id": "harbor"})
    assert named.status_code == 400  # says more: where the token would be used
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/generative_score", json={}).status_code == 404
    for path in paths:  # the router finds the route of a path with a final newline
        for end in ("%0A", "%0a", "%0A%0A", "%0D", "%7F", "%00"):
            answer = http.post(path + end, content=b'{"prompt": "hi"}')
            assert answer.status_code == 404, path + end
            assert answer.json()["error"]["code"] == 404


def test_every_route_of_vllm_is_known():
    """A new one must be put among those that --be-require refuses, or among those that it lets pass."""
    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0]) / "entrypoints"
    route = re.compile(r'(?:\.post|add_api_route)\(\s*"(/[^"]*)"')
    found = {path for file in root.rglob("*.py") for path in route.findall(file.read_text(encoding="utf-8"))}
    assert len(found) > 40
    assert found - SUPPORTED - TOKENLESS - {*HARMLESS, *NO_CHAT} == set()
    assert found >= TOKENLESS
    assert not TOKENLESS & SUPPORTED


def test_the_setting():
    assert Settings.from_env({}).require is False
    assert Settings.from_env({"BE_REQUIRE": "1"}).require is True
