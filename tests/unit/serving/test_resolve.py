"""Naming rules of the contract, each with its refusal."""

from __future__ import annotations

import pytest

from be_serve.core.errors import (
    InvalidBeId,
    NameConflict,
    RequestError,
    SystemConflict,
    TokenNotFound,
    UnsupportedRequest,
)
from be_serve.registry import Registry, TokenIndex
from be_serve.serving.requests import BEFields, refuse_raw_embeddings
from be_serve.serving.resolve import Resolver
from tests.factories import PROMPT, make_token

BASE = "builtin:tiny"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def index(tmp_path):
    registry = Registry(f"sqlite:///{tmp_path / 'r.db'}")
    registry.put(make_token("harbor").to_bytes(), match=True)
    registry.put(make_token("other", prompt="Something else.", seed=1).to_bytes())
    index = TokenIndex(registry, prepare=lambda t: t, check=lambda t: None)
    index.refresh()
    return index


@pytest.fixture
def resolver(index):
    return Resolver(index, lambda: [BASE])


def resolve(resolver, messages=USER, model=BASE, **fields):
    return resolver.resolve(BEFields.parse(fields), model, messages)


def system(text, role="system"):
    return [{"role": role, "content": text}, *USER]


def test_plain_requests_are_plain(resolver):
    assert resolve(resolver) is None
    assert resolve(resolver, model=None) is None
    assert resolve(resolver, system("Be nice.")) is None
    assert resolve(resolver, be_id=None) is None


def test_by_id_and_alias(resolver):
    assert resolve(resolver, be_id="harbor").how == "be_id"
    found = resolve(resolver, model=f"{BASE}:harbor")
    assert (found.tokens.name, found.how) == ("harbor", "alias")
    assert resolve(resolver, model=f"{BASE}:harbor", be_id="harbor").tokens.name == "harbor"
    with pytest.raises(NameConflict):
        resolve(resolver, model=f"{BASE}:harbor", be_id="other")
    with pytest.raises(TokenNotFound):
        resolve(resolver, be_id="nobody")
    with pytest.raises(InvalidBeId):
        resolve(resolver, model=f"{BASE}:No")


@pytest.mark.parametrize("text", ["", "  ", PROMPT, PROMPT + "\n", None])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_text_it_stands_for_is_dropped(resolver, text, role):
    found = resolve(resolver, system(text, role), be_id="harbor")
    assert found.messages == USER
    assert found.append is None


def test_other_system_text(resolver):
    with pytest.raises(SystemConflict, match="append"):
        resolve(resolver, system("Be nice."), be_id="harbor")
    found = resolve(resolver, system("Be nice."), be_id="harbor", be_system="append")
    assert (found.messages, found.append) == (USER, "Be nice.")
    both = [{"role": "system", "content": PROMPT}, {"role": "developer", "content": "Be brief."}, *USER]
    assert resolve(resolver, both, be_id="harbor", be_system="append").append == "Be brief."
    with pytest.raises(SystemConflict, match="middle"):
        resolve(resolver, [*USER, {"role": "system", "content": "x"}], be_id="harbor", be_system="append")
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(SystemConflict, match="text"):
        resolve(resolver, [{"role": "system", "content": image}, *USER], be_id="harbor")


def test_exact_match_is_opt_in_and_exact(index, resolver):
    found = resolve(resolver, system(PROMPT + " \n"))
    assert (found.tokens.name, found.how, found.messages) == ("harbor", "match", USER)
    parts = [{"role": "developer", "content": [{"type": "text", "text": PROMPT}]}, *USER]
    assert resolve(resolver, parts).how == "match"
    assert resolve(resolver, system("Something else.")) is None  # registered without match
    assert resolve(resolver, system(" " + PROMPT)) is None
    assert resolve(resolver, system(PROMPT), be_match=False) is None
    assert resolve(resolver, [*system(PROMPT), {"role": "system", "content": "x"}]) is None
    assert resolve(resolver, [*USER, {"role": "system", "content": PROMPT}]) is None
    assert resolve(Resolver(index, lambda: [BASE], match=False), system(PROMPT)) is None
    assert resolve(Resolver(index, lambda: [BASE], usable=lambda r: False), system(PROMPT)) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"be_system": "replace"},
        {"be_system": "append"},
        {"be_match": "no"},
        {"be_match": 0},
        {"be_system": 1},
        {"be_fallback": "full"},
        {"be_id": "harbor", "be_fallback": True},
        {"be_id": []},
        {"be_id": ["harbor"] * 9},
        {"be_id": ["harbor", None]},
    ],
)
def test_malformed_fields(resolver, fields):
    with pytest.raises(RequestError):
        resolve(resolver, **fields)


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([{"role": "user", "content": "a <prompt_embeds> b"}], None),
        ([{"role": "user", "content": [{"type": "text", "text": "<prompt_embeds>"}]}], None),
        ([{"role": "user", "content": [{"type": "prompt_embeds", "data": "AA=="}]}], None),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": '{"a": "<prompt_embeds>"}'}}]}], None),
        (USER, [{"function": {"name": "f", "parameters": {"<prompt_embeds>": {}}}}]),
        ((m for m in [{"role": "user", "content": iter([{"type": "prompt_embeds"}])}]), None),
    ],
)
def test_raw_embeddings_are_refused_in_every_form(messages, tools):
    with pytest.raises(UnsupportedRequest):
        refuse_raw_embeddings(messages if isinstance(messages, list) else list(messages), tools)
    refuse_raw_embeddings(USER, [{"function": {"name": "f"}}])


def test_tokens_of_a_list_stand_in_order(resolver):
    found = resolve(resolver, be_id=["other", "harbor"])
    assert (found.tokens.name, found.tokens.k) == ("other,harbor", 4)
    assert found.tokens.digest.count(",") == 1
    for text in (PROMPT, "Something else."):
        assert resolve(resolver, system(text), be_id=["other", "harbor"]).messages == USER
    with pytest.raises(SystemConflict, match="other,harbor"):
        resolve(resolver, system("Be nice."), be_id=["other", "harbor"])
    with pytest.raises(TokenNotFound):
        resolve(resolver, be_id=["harbor", "nobody"])
    with pytest.raises(NameConflict):
        resolve(resolver, model=f"{BASE}:harbor", be_id=["harbor", "other"])


def test_the_full_prompts_stand_in_order_too(resolver):
    fields = BEFields.parse({"be_id": ["a", "b"], "be_system": "append"})
    chat = resolver.full(fields, ["a", "b"], ["First.", "Second."], system("Third."))
    assert chat == system("First.\n\nSecond.\n\nThird.")
    assert resolver.full(fields, ["a", "b"], ["First.", "Second."], system("Second.")) == system("First.\n\nSecond.")
