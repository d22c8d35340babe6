"""`be_fallback`: the stored prompt answers where its token cannot, and nobody reads it."""

from __future__ import annotations

import pytest

from be_serve.core.errors import TooLarge, TooManyVectors, UnsupportedRequest
from be_serve.serving.injection.resident_rows import ResidentRows
from be_serve.serving.injection.row_pool import RowPool
from tests.factories import PROMPT, make_token
from tests.unit.serving.hooks import FULL, USER, make_hook, request

FIELDS = {"be_id": "harbor", "be_fallback": "full"}


async def test_the_stored_prompt_answers_for_a_removed_token(tmp_path, context):
    hook, index, registry = make_hook(tmp_path)
    registry.store_prompt("harbor", PROMPT + "\n")
    registry.remove("harbor")
    index.refresh()
    answered = await hook.begin(request(**FIELDS), USER, None)
    assert answered.messages == FULL
    assert context.headers == {"x-be-fallback": "full"}
    registry.close()
    (tmp_path / "r.db").rename(tmp_path / "moved.db")
    assert (await hook.begin(request(**FIELDS), USER, None)).messages == FULL  # read once


@pytest.mark.parametrize(
    "option",
    [
        {"return_token_ids": True},
        {"return_prompt_text": True},
        {"enable_response_messages": True},
        {"return_token_offsets": True},
        {"prompt_logprobs": 0},
        {"echo": True},
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"truncate_prompt_tokens": 3},
    ],
)
@pytest.mark.parametrize("removed", [True, False])
async def test_no_option_shows_a_stored_prompt(tmp_path, context, option, removed):
    """Not even while the token itself could answer: a request must not pass until the day it falls back."""
    hook, index, registry = make_hook(tmp_path, capacity=10, quality={"verdict": {"status": "failed"}})
    registry.store_prompt("harbor", PROMPT)
    if removed:
        registry.remove("harbor")
    index.refresh()
    asked = request(**FIELDS)
    for name, value in option.items():
        setattr(asked, name, value)
    with pytest.raises(UnsupportedRequest):
        await hook.begin(asked, USER, None)


async def test_tokenize_shows_no_stored_prompt(tmp_path, context):
    hook, index, registry = make_hook(tmp_path)
    registry.store_prompt("harbor", PROMPT)
    registry.remove("harbor")
    index.refresh()
    context.path = "/tokenize"
    with pytest.raises(UnsupportedRequest):
        await hook.begin(request(**FIELDS), USER, None)


@pytest.mark.parametrize("quality", [{"verdict": "lossy"}, {"verdict": {"status": "failed"}}])
async def test_a_token_that_is_marked_gives_way(tmp_path, context, quality):
    hook, index, registry = make_hook(tmp_path, quality=quality)
    assert (await hook.begin(request(be_id="harbor"), USER, None)).tokens.name == "harbor"
    # Without a text there is nothing better than the token.
    assert (await hook.begin(request(**FIELDS), USER, None)).tokens.name == "harbor"
    registry.store_prompt("harbor", PROMPT)
    index.refresh()
    assert (await hook.begin(request(**FIELDS), USER, None)).messages == FULL
    # Who takes the token as it is wants the prompt only where there is no token.
    marked = await hook.begin(request(be_id="harbor", be_fallback="unavailable"), USER, None)
    assert marked.tokens.name == "harbor"
    registry.remove("harbor")
    index.refresh()
    assert (await hook.begin(request(be_id="harbor", be_fallback="unavailable"), USER, None)).messages == FULL


async def test_no_room_is_seen_when_the_vectors_are_placed(tmp_path, context):
    hook, index, registry = make_hook(tmp_path, capacity=10)
    registry.store_prompt("harbor", PROMPT)
    index.refresh()
    rendering = await hook.begin(request(**FIELDS), USER, None)
    ids = hook.cut(rendering, f"a{rendering.marker}b")
    with pytest.raises(TooLarge) as caught:
        hook.finish(rendering, {"type": "token", "prompt_token_ids": ids})
    assert (await hook.on_unavailable(rendering, caught.value)).messages == FULL
    assert context.headers == {"x-be-fallback": "full"}
    await hook.begin(request(be_id="harbor"), USER, None)
    assert context.headers["x-be-fallback"] == "partial"  # another chat of a batch


async def test_too_few_rows_is_no_room_and_nobody_waits(tmp_path, context):
    async def write(rows, vectors):
        pass

    hook, index, registry = make_hook(tmp_path, injection=ResidentRows(RowPool(range(1), write), first=50_000))
    with pytest.raises(TooManyVectors):
        await hook.begin(request(**FIELDS), USER, None)
    registry.store_prompt("harbor", PROMPT)
    index.refresh()
    assert (await hook.begin(request(**FIELDS), USER, None)).messages == FULL
    pool = RowPool(range(2), write, patience=60)
    hook, index, registry = make_hook(tmp_path / "b", injection=ResidentRows(pool, first=50_000))
    registry.store_prompt("harbor", PROMPT)
    index.refresh()
    await pool.lease([("other", [0, 1])])
    assert (await hook.begin(request(**FIELDS), USER, None)).messages == FULL


async def test_templates_without_a_system_role(tmp_path, context):
    hook, index, registry = make_hook(tmp_path, template="gemma2")
    registry.store_prompt("harbor", PROMPT)
    registry.remove("harbor")
    index.refresh()
    (message,) = (await hook.begin(request(**FIELDS), USER, None)).messages
    assert message == {"role": "user", "content": f"{PROMPT}\n\nHi"}


async def test_only_the_tokens_own_prompt_counts(tmp_path, context):
    """A text that an older server left under the id, or one of the registry's beside --be-token."""
    hook, index, registry = make_hook(tmp_path)
    registry.store_prompt("harbor", PROMPT)
    index.add_static("harbor", make_token("harbor", prompt="Another.", quality={"verdict": "lossy"}).to_bytes())
    index.refresh()
    assert (await hook.begin(request(**FIELDS), USER, None)).tokens.name == "harbor"
    index.add_static("harbor", make_token("harbor", quality={"verdict": "lossy"}, text=PROMPT).to_bytes())
    assert (await hook.begin(request(**FIELDS), USER, None)).messages == FULL  # it stands in the file


async def salted(hook, chat=USER, salt="mine", **options):
    """The cache salt of a chat that falls back."""
    asked = request(**FIELDS)
    for name, value in options.items():
        (asked.model_extra.__setitem__ if name.startswith("be_") else asked.__setattr__)(name, value)
    answered = await hook.begin(asked, chat, None)
    return answered.with_cache_salt({"prompt_token_ids": [1], "cache_salt": salt})["cache_salt"]


async def test_no_chat_of_a_clients_own_making_finds_a_stored_prompts_blocks(tmp_path, context):
    """`usage` tells how much was cached: a guess of the prompt's next token must never meet the prompt's own blocks."""
    hook, index, registry = make_hook(tmp_path)
    registry.put(make_token("other", prompt="Another prompt.", seed=3).to_bytes())
    for name, text in (("harbor", PROMPT), ("other", "Another prompt.")):
        registry.store_prompt(name, text)
        registry.remove(name)
    index.refresh()
    found = await salted(hook)
    assert found == await salted(hook)  # the next such chat finds them
    assert found == await salted(hook, [{"role": "user", "content": "Something else"}])
    assert "mine" not in found
    others = [
        await salted(hook, salt="yours"),
        await salted(hook, be_id=["harbor", "other"]),  # what stands in the place of `append`'s text
        await salted(hook, chat_template_kwargs={"bos_token": "my own beginning"}),
        await salted(hook, tools=[{"type": "function", "function": {"name": "my own beginning"}}]),
    ]
    assert len({found, *others}) == 5
    sent = await hook.begin(request(), FULL, None)
    assert (
        sent is None or sent.with_cache_salt({"cache_salt": "mine"})["cache_salt"] == "mine"
    )  # a client's own chat is its own
