"""What the hook refuses, counts and gives back, with vLLM's part played by the test."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from be_serve.core.errors import BEError, NotAuthenticated, OverBudget, TooLarge, UnsupportedRequest
from be_serve.core.slots import Slot
from be_serve.registry import TokenIndex
from be_serve.serving.injection.byte_budget import ByteBudget
from be_serve.serving.injection.prompt_embeds import PromptEmbeds
from be_serve.serving.injection.resident_rows import ResidentRows, salt
from be_serve.serving.injection.row_pool import RowPool
from be_serve.serving.injection.vectors import prepare
from be_serve.serving.metrics import metrics
from tests.factories import make_token
from tests.unit.serving.hooks import FULL, USER, make_hook, request


async def test_a_request_takes_and_gives_back_its_memory(tmp_path, context):
    hook, _, _ = make_hook(tmp_path, capacity=4000)
    rendering = await hook.begin(request(be_id="harbor"), USER, None)
    text = hook.check_prompt({"prompt": f"<|im_start|>system\n{rendering.marker}<|im_end|>\n"})
    ids = hook.cut(rendering, text)
    assert ids.count(0) == 2
    engine_input = {"type": "token", "prompt_token_ids": ids}
    assert "prompt_embeds" in hook.finish(rendering, engine_input)
    assert hook._injection._budget.used == len(ids) * 8 * 4
    while hook._injection._budget.used + len(ids) * 32 <= 4000:
        hook.finish(rendering, engine_input)
    with pytest.raises(TooLarge):  # waiting would not help
        hook.finish(rendering, engine_input)
    other = await hook.begin(request(be_id="harbor"), USER, None)
    hook.cut(other, text.replace(rendering.marker, other.marker))
    with pytest.raises(OverBudget):
        hook.finish(other, engine_input)
    for clean in context.cleanup:
        clean()
    assert hook._injection._budget.used == 0
    with pytest.raises(UnsupportedRequest, match="cut"):
        hook.finish(rendering, {"type": "token", "prompt_token_ids": ids[:-1]})
    with pytest.raises(UnsupportedRequest, match="resident-rows"):
        hook.check_prompt({"prompt": text, "multi_modal_data": {"image": [1]}})


async def test_every_choice_of_a_request_takes_its_own_memory(tmp_path, context):
    """vLLM sends a prompt's tensor to the engine once for each of `n`."""
    hook, _, _ = make_hook(tmp_path, capacity=100_000)
    rendering = await hook.begin(request(be_id="harbor", n=5), USER, None)
    ids = hook.cut(rendering, f"<|im_start|>system\n{rendering.marker}<|im_end|>\n")
    engine_input = {"type": "token", "prompt_token_ids": ids}
    hook.finish(rendering, engine_input)
    assert hook._injection._budget.used == 5 * len(ids) * 8 * 4
    for clean in context.cleanup:
        clean()
    with pytest.raises(UnsupportedRequest, match="ended before"):  # nobody would give it back
        hook.finish(rendering, engine_input)
    assert hook._injection._budget.used == 0


async def test_what_a_background_response_needs_is_kept_or_refused(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    with pytest.raises(UnsupportedRequest, match="background response cannot use a token"):
        await hook.begin(request(be_id="harbor", background=True), USER, None)
    assert await hook.begin(request(background=True), FULL, None) is None

    async def write(rows, vectors):
        context.over = True  # the client goes away while its rows are written

    pool = RowPool(range(4), write)
    hook, _, _ = make_hook(tmp_path / "rows", injection=ResidentRows(pool, first=50_000))
    with pytest.raises(UnsupportedRequest, match="background response cannot use a token in turns after"):
        await hook.begin(request(be_id="harbor", background=True), USER, None)
    assert pool._make_room(4)


async def test_a_matched_request_is_never_refused(tmp_path, context):
    hook, _, registry = make_hook(tmp_path)
    for bad in ({"prompt_logprobs": 1}, {"truncate_prompt_tokens": 3}):
        assert await hook.begin(request(**bad), FULL, None) is None
        with pytest.raises(UnsupportedRequest):
            await hook.begin(request(be_id="harbor", **bad), USER, None)
    # The registry is gone and nothing is cached: the full prompt answers, a named token is an error.
    (tmp_path / "r.db").rename(tmp_path / "moved.db")
    registry.close()
    assert await hook.begin(request(), FULL, None) is None
    with pytest.raises(BEError) as caught:
        await hook.begin(request(be_id="harbor"), USER, None)
    assert str(tmp_path) not in caught.value.message
    assert "x-be-id" not in context.headers


def counted(how, path="/v1/chat/completions"):
    return metrics().requests.labels(path=path, how=how)._value.get()


async def test_a_match_that_cannot_be_had_is_counted_as_such(tmp_path, context):
    hook, _, _ = make_hook(tmp_path, capacity=4000)
    plain, missed = counted("plain"), counted("match_missed")
    await hook.begin(request(), USER, None)
    assert (counted("plain"), counted("match_missed")) == (plain + 1, missed)
    await hook.on_unavailable(await hook.begin(request(), FULL, None), UnsupportedRequest("no place"))
    assert (counted("plain"), counted("match_missed")) == (plain + 1, missed + 1)
    full = ResidentRows(RowPool(range(1), None), first=50_000)  # the token has two vectors
    crowded, _, _ = make_hook(tmp_path / "crowded", injection=full)
    assert await crowded.begin(request(), FULL, None) is None
    assert (counted("plain"), counted("match_missed")) == (plain + 1, missed + 2)


async def test_images_stand_beside_rows_where_they_leave_the_slot_alone(tmp_path, context):
    async def write(rows, vectors):
        pass

    hook, _, _ = make_hook(tmp_path, injection=ResidentRows(RowPool(range(4), write), first=50_000))
    rendering = await hook.begin(request(be_id="harbor"), USER, None)
    text = f"<|im_start|>system\n{rendering.marker}<|im_end|>\n<|im_start|>user\nHi"
    assert hook.check_prompt({"prompt": text, "multi_modal_data": {"image": [1]}}) == text
    ids = hook.cut(rendering, text)
    slot, end = rendering.slot, len(rendering.slot.before) + 2
    expanded = [*ids[:end], 7, 7, 7, *ids[end:]]  # where the processor put an image

    def given(ids, offset):
        placeholders = {"image": [SimpleNamespace(offset=offset, length=3)]}
        return {"type": "multimodal", "prompt_token_ids": ids, "mm_placeholders": placeholders}

    found = hook.finish(rendering, given(expanded, end))
    rows = sorted(id for id in found["prompt_token_ids"] if id >= 50_000)
    assert rows == [50_000, 50_001]
    assert found["prompt_token_ids"] == [*slot.before, *rows, 7, 7, 7, *slot.after]
    for moved in (given([7, *expanded], end + 1), given(expanded, 1)):
        with pytest.raises(UnsupportedRequest, match="moved"):
            hook.finish(rendering, moved)


async def test_giving_up_a_match_leaves_no_trace(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    matched = await hook.begin(request(), FULL, None)
    assert context.headers["x-be-match"] == "exact"
    assert (await hook.on_unavailable(matched, UnsupportedRequest("x"))).messages == FULL
    assert context.headers == {}
    named = await hook.begin(request(be_id="harbor"), USER, None)
    with pytest.raises(UnsupportedRequest):
        await hook.on_unavailable(named, UnsupportedRequest("x"))


async def test_who_is_answered_by_the_prompt_holds_no_rows_meanwhile(tmp_path, context, monkeypatch):
    async def write(rows, vectors):
        pass

    pool = RowPool(range(4), write)
    hook, _, _ = make_hook(tmp_path, injection=ResidentRows(pool, first=50_000))
    matched = await hook.begin(request(), FULL, None)
    assert not pool._make_room(4)
    await hook.on_unavailable(matched, UnsupportedRequest("no place"))
    assert pool._make_room(4)

    def cannot_mark(*args, **kwargs):
        raise UnsupportedRequest("no place")

    monkeypatch.setattr(hook._slots, "mark", cannot_mark)
    assert await hook.begin(request(), FULL, None) is None
    assert pool._make_room(4)


async def test_a_lora_adapter_gets_no_token(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    assert await hook.begin(request(model="my-lora"), FULL, None) is None
    with pytest.raises(UnsupportedRequest, match="base model"):
        await hook.begin(request(model="my-lora", be_id="harbor"), USER, None)


async def test_tokenize_needs_the_api_key_where_there_is_one(tmp_path, context):
    hook, _, _ = make_hook(tmp_path, keys=["k1", "k2"])
    context.path = "/tokenize"
    for named in ({"be_id": "harbor"}, {"model": "tiny:harbor"}):
        with pytest.raises(NotAuthenticated):
            await hook.begin(request(**named), USER, None)
    assert await hook.begin(request(), FULL, None) is None
    context.authorization = "Bearer k2"
    rendering = await hook.begin(request(be_id="harbor"), USER, None)
    ids = hook.cut(rendering, f"a{rendering.marker}b")
    assert hook.finish(rendering, {"type": "token", "prompt_token_ids": ids})["prompt_token_ids"] == ids
    assert hook._injection._budget.used == 0


async def test_other_paths_see_plain_requests_only(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    context.path = "/v1/chat/completions/render"
    assert await hook.begin(request(), FULL, None) is None


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions/render", "/v9/chat", None])
@pytest.mark.parametrize("require", [False, True])
async def test_a_token_named_on_another_path_is_refused(tmp_path, context, path, require):
    """/invocations takes `model` from a header of SageMaker, after the middleware has read the body."""
    from be_serve.serving.middleware import current

    hook, _, _ = make_hook(tmp_path, require=require)
    context.path = path or context.path
    reset = current.set(context if path else None)
    try:
        for named in (
            {"model": "tiny:harbor"},
            {"be_id": "harbor"},
            {"be_id": 7},
            {"be_system": "append"},
            {"be_fallback": "full"},
            {"be_match": True},
            {"be_match": False, "model": "tiny:harbor"},
        ):
            with pytest.raises(UnsupportedRequest, match="cannot use a token") as caught:
                await hook.begin(request(**named), USER, None)
            assert caught.value.param in named
        if not require:
            for plain in ({}, {"be_match": False}, {"be_id": None}, {"model": "my-lora"}):
                assert await hook.begin(request(**plain), USER, None) is None
    finally:
        current.reset(reset)


async def test_the_scan_leaves_lazy_lists_usable(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    message = {"role": "assistant", "content": "x", "tool_calls": iter([{"id": "1"}])}
    await hook.begin(request(), [*USER, message], None)
    assert list(message["tool_calls"]) == [{"id": "1"}]


def test_a_replaced_token_is_never_missing(tmp_path):
    """Readers see the old or the new record while the index is refreshed, never neither."""
    import threading

    _, index, registry = make_hook(tmp_path)
    stop, missing = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                index.get("harbor")
            except BEError:
                missing.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(1, 15):
        registry.put(make_token("harbor", seed=seed).to_bytes(), replace=True)
        index.refresh()
    stop.set()
    reader.join()
    assert missing == []


def test_an_unreadable_row_does_not_stop_the_others(tmp_path):
    import sqlite3
    import time

    _, _, registry = make_hook(tmp_path)
    registry.put(make_token("fine", seed=3).to_bytes())
    with sqlite3.connect(tmp_path / "r.db") as db:
        db.execute("UPDATE be_version SET manifest = '{\"from\": \"the future\"}' WHERE id = 'harbor'")
        db.execute("UPDATE be_token SET revision = 99 WHERE id = 'harbor'")
        db.execute("UPDATE be_meta SET revision = 99")
    index = TokenIndex(registry, prepare=lambda t: torch.from_numpy(t.vectors), check=lambda t: None, poll_seconds=0.05)
    index.start()
    assert [r.id for r in index.records()] == ["fine"]
    registry.remove("fine")
    deadline = time.monotonic() + 5
    while index.records():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    index.stop()


async def test_prompt_embeds_puts_the_vectors_in_the_slot():
    token = make_token(k=2, hidden_size=8)
    slot = Slot([5, 6], [7])
    injection = PromptEmbeds(ByteBudget(1000))
    held = await injection.hold([("d", prepare(token, torch.bfloat16))])
    made = injection.inject(
        {"type": "token", "prompt_token_ids": slot.ids(2), "cache_salt": "s", "prompt": "p"}, slot, held
    )
    assert made["is_token_ids"] == [True, True, False, False, True]
    assert made["prompt_embeds"].shape == (5, 8)
    assert made["prompt_embeds"].dtype == torch.bfloat16
    np.testing.assert_allclose(made["prompt_embeds"][2:4].float().numpy(), token.vectors, rtol=1e-2)
    assert not made["prompt_embeds"][[0, 1, 4]].any()
    assert made["cache_salt"] == "s"
    assert "prompt" not in made


async def test_resident_rows_put_ids_in_the_slot(tmp_path, context):
    written = {}

    async def write(rows, vectors):
        written.update(zip(rows, vectors, strict=True))

    pool = RowPool(range(3, 6), write)
    hook, _, _ = make_hook(tmp_path, injection=ResidentRows(pool, first=50_000))
    rendering = await hook.begin(request(be_id="harbor"), USER, None)
    ids = hook.cut(rendering, f"<|im_start|>system\n{rendering.marker}<|im_end|>\n")
    made = hook.finish(rendering, {"type": "token", "prompt_token_ids": ids, "cache_salt": "mine"})
    rows = [i - 50_000 for i in made["prompt_token_ids"] if i >= 50_000]
    assert len(rows) == 2
    assert set(rows) == set(written)
    assert [i for i in made["prompt_token_ids"] if i < 50_000] == made["prompt_token_ids"].plain
    assert made["prompt_token_ids"].plain == [i for i in ids if i]  # placeholders are zeros
    assert made["cache_salt"] not in ("mine", salt(rendering.tokens.digest, None))
    lease = made["prompt_token_ids"].lease.renew()
    for clean in context.cleanup:
        clean()
    assert not pool._make_room(3)  # the engine may still embed the request again
    lease.release()
    assert pool._make_room(3)
