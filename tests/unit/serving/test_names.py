"""Keys that are a slip of one of our fields are refused wherever nobody would read them; other keys pass."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import random
import string
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from be_serve.core.errors import BEError, MisnamedField
from be_serve.core.names import FIELDS, PLACES, field_near, find_slip
from be_serve.serving import middleware, routes
from be_serve.serving.metrics import metrics
from be_serve.serving.middleware import SUPPORTED, BEMiddleware, RequestContext, current
from tests.unit.serving.hooks import USER, make_hook, request

STRICT = ("/v1/messages", "/v1/messages/count_tokens")
HOOKED = sorted(SUPPORTED.difference(STRICT))
BYPASSING = ("/v1/completions", "/v1/chat/completions/render", "/inference/v1/generate")


def plain(key: str) -> str:
    key = unicodedata.normalize("NFKC", key).removesuffix("[]")
    return key.lower().replace("-", "").replace("_", "").replace(" ", "")


def distance(one: str, other: str) -> int:
    """Levenshtein's, by its definition, with two swapped neighbours as one edit."""
    rows = [list(range(len(other) + 1))]
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (a != b)))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                row[j] = min(row[j], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def nearest(key: str) -> int:
    return min(distance(plain(key), plain(name)) for name in FIELDS)


def marked(key: str) -> bool:
    """Whether a key is one of our fields but for its writing, or has `be` as a word of its own."""
    if plain(key) in map(plain, FIELDS):
        return True
    letters = unicodedata.normalize("NFKC", key).lstrip("-_ ")
    word, end = letters[:2], letters[2:3]
    return word.lower() == "be" and (end in ("-", "_", " ") or (word[1] == "e" and end in string.ascii_uppercase))


def refused_in(place: str | None, key: str) -> bool:
    """The rule for a key within one edit of a field: others' namespaces keep the words that are near by chance."""
    return place not in OTHERS or marked(key)


def bad_keys(count: int = 200) -> list[str]:
    """Slips of our fields: at most one edit, then other separators and another case."""
    draw = random.Random(7)
    found: dict[str, None] = {}
    while len(found) < count:
        letters = list(plain(draw.choice(FIELDS)))
        at, letter = draw.randrange(len(letters)), draw.choice(string.ascii_lowercase + string.digits + "'\"\\/.é")
        match draw.choice(["same", "insert", "delete", "substitute", "swap", "fullwidth"]):
            case "insert":
                letters.insert(draw.randrange(len(letters) + 1), letter)
            case "delete":
                del letters[at]
            case "substitute":
                letters[at] = letter
            case "swap":
                letters[at - 1 : at + 1] = reversed(letters[at - 1 : at + 1])
            case "fullwidth":
                letters = [chr(ord(one) + 0xFEE0) for one in letters]
        for _ in range(draw.randrange(4)):
            letters.insert(draw.randrange(len(letters) + 1), draw.choice("-_ "))
        key = "".join(letter.upper() if draw.random() < 0.3 else letter for letter in letters)
        key += draw.choice(["", "", "", "[]"])
        if key not in FIELDS:
            found[key] = None
    return list(found)


def innocent_keys(count: int = 200) -> list[str]:
    """Keys of all lengths, some made of our fields by two edits and more."""
    draw = random.Random(11)
    found = ["id", "seed", "beta_id", "system", "match", "fallback", "web_id", "be", "user_id", "session_id", ""]
    while len(found) < count:
        letters = list(draw.choice([*FIELDS, "temperature", "request_id", "bedrock_id", "min_p"]))
        for _ in range(draw.randrange(2, 5)):
            letters.insert(draw.randrange(len(letters) + 1), draw.choice(string.ascii_letters + "-_é"))
        key = "".join(letters)
        if nearest(key) > 1:
            found.append(key)
    return found


def at(place: str | None, key: str) -> dict:
    return {key: "harbor"} if place is None else {place: {key: "harbor"}}


EVERYWHERE = (None, *PLACES)
OTHERS = ("metadata", "chat_template_kwargs")
# Words that are within one edit of `be_id` or `be_match` by chance.
NEAR_BY_CHANCE = ["eid", "bid", "bed", "bead", "bend", "beid2", "reid", "weid", "rematch", "BID", "Bed", "e_id", "BEAD"]


def draw_place(draw: random.Random, key: str) -> str | None:
    """A place where a key near a field is refused."""
    return draw.choice([place for place in EVERYWHERE if refused_in(place, key)])


CHOSEN = [
    "be_ids",
    "be-id",
    "BE_ID",
    "beId",
    "be id",
    "Be__Id",
    "be_idd",
    "be_di",
    "be_id[]",
    "be_ids[0]",
    "\uff42\uff45_id",
]


@pytest.mark.parametrize("key", [*bad_keys(), *CHOSEN, *NEAR_BY_CHANCE, "eb_id", "bied"])
def test_a_slip_is_known_in_every_place(key):
    for place in EVERYWHERE:
        slip = find_slip(at(place, key), at(place, key))
        if not refused_in(place, key):
            assert slip is None
            continue
        assert slip.key == (key if place is None else f"{place}.{key}")
        assert distance(plain(key.removesuffix("[0]")), plain(slip.field)) <= 1


def test_others_namespaces_keep_words_that_are_near_by_chance():
    for place in OTHERS:
        for key in NEAR_BY_CHANCE:
            assert find_slip({}, at(place, key)) is None, key
        for key in CHOSEN:
            assert find_slip({}, at(place, key)).key == f"{place}.{key}"
    for place in (None, "extra_body", "vllm_xargs"):
        for key in (*NEAR_BY_CHANCE, *CHOSEN):
            assert find_slip(at(place, key), at(place, key)), key
    assert field_near("bead_id") is None  # two edits


def test_extra_body_is_looked_into_whatever_form_it_has():
    for name in FIELDS:
        field = {name: "x"}
        for value in (field, [field], [7, field], json.dumps(field), json.dumps([field]), f" {json.dumps(field)}"):
            assert find_slip({}, {"extra_body": value}).key == f"extra_body.{name}"
            deeper = find_slip({}, {"extra_body": {"extra_body": value}})
            assert (deeper.key, deeper.place) == (f"extra_body.extra_body.{name}", "extra_body")
    for value in ("", "{", "[" * 5000, "be_id", '"be_id"', "7", [["be_id"]], {"extra_body": {"be_ids": "x"}}):
        assert find_slip({}, {"extra_body": value}) is None
    for place in ("metadata", "vllm_xargs", "chat_template_kwargs"):
        assert find_slip({}, {place: '{"be_id": "x"}'}) is None


def test_innocent_keys_are_none():
    assert len({*innocent_keys()}) >= 190
    for key in innocent_keys():
        assert field_near(key) is None, key
        for place in EVERYWHERE:
            assert find_slip(at(place, key), at(place, key)) is None


def test_our_own_keys_are_read_at_the_top_alone():
    for name in FIELDS:
        assert find_slip({name: "x"}, {name: "x"}) is None
        for place in PLACES:
            assert find_slip({}, at(place, name)).key == f"{place}.{name}"
            assert find_slip({}, at(place, name), read_in=(place,)) is None
            assert find_slip({}, at(place, name.upper()), read_in=(place,)).field == name
            assert find_slip({}, {place: {name: None}}) is None


@pytest.mark.parametrize("value", [None, "be_id", ["be_id"], 7, True, [], {}, {"deep": {"be_id": "x"}}, {3: "x"}])
def test_places_may_hold_anything(value):
    for place in PLACES:
        assert find_slip({place: value}, {place: value}) is None


def stock_fields() -> set[str]:
    """Every field of every request class of the installed vLLM, and its aliases."""
    root = Path(importlib.util.find_spec("vllm").submodule_search_locations[0]) / "entrypoints"
    found: set[str] = set()
    for file in root.rglob("protocol.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                fields = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
                found |= {field.id for field in fields if isinstance(field, ast.Name)}
            if isinstance(node, ast.keyword) and node.arg in ("alias", "validation_alias"):
                found |= {one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def test_no_field_of_vllms_requests_is_a_slip():
    fields = stock_fields()
    assert {"messages", "prompt", "token_ids", "input", "vllm_xargs", "query", "instructions", "seed"} <= fields
    assert len(fields) > 300
    assert [name for name in fields if field_near(name)] == []


# --- through the hook ---


@pytest.fixture
def ask(tmp_path):
    """A chat as the hook gets it on some path, with these extra fields and fields of its class."""
    hook, _, _ = make_hook(tmp_path)

    async def begin(path: str, extra: dict, **fields):
        made = request(**extra)
        vars(made).update(fields)
        context = RequestContext(path)
        token = current.set(context)
        try:
            return await hook.begin(made, USER, None)
        finally:
            current.reset(token)
            for clean in context.cleanup:
                clean()

    return begin


@pytest.mark.parametrize("path", HOOKED)
async def test_the_hook_refuses_slips_and_passes_the_rest(ask, path):
    draw = random.Random(path)
    for key in bad_keys():
        place = draw_place(draw, key)
        with pytest.raises(MisnamedField) as caught:
            await ask(path, at(place, key))
        assert caught.value.http_status == 400
        assert caught.value.param.endswith(key)
        assert f"`{caught.value.param}`" in caught.value.message
        assert f"send `{find_slip(at(place, key), at(place, key)).field}` at the top level" in caught.value.message
    for key in NEAR_BY_CHANCE:
        assert await ask(path, at(draw.choice(OTHERS), key)) is None
    for key in innocent_keys():
        assert await ask(path, at(draw.choice(EVERYWHERE), key)) is None


async def test_objects_that_are_fields_of_the_class_are_looked_into(ask):
    for place in PLACES:
        with pytest.raises(MisnamedField, match=f"{place}.be_id"):
            await ask("/v1/chat/completions", {}, **{place: {"be_id": "harbor"}})
    assert await ask("/v1/chat/completions", {}, metadata=None, vllm_xargs={}, chat_template_kwargs="x") is None
    assert (await ask("/v1/chat/completions", {"be_id": "harbor"}, metadata={"user_id": "7"})).tokens.name == "harbor"
    with pytest.raises(MisnamedField, match="argument of the SDKs"):
        await ask("/v1/responses", {"extra_body": {"be_id": "harbor"}})
    with pytest.raises(MisnamedField):  # though the token is named as well
        await ask("/v1/responses", {"be_id": "harbor", "be-system": "append"})


# --- through the middleware ---


@pytest.fixture
def http():
    """An app whose Messages endpoints answer with what the hook would be given, others with their body."""
    app = FastAPI()
    app.add_middleware(
        BEMiddleware, base_models=lambda: ["org/tiny"], metrics=metrics, is_route=partial(routes.is_post_route, app)
    )

    async def echo(request: Request):
        context = current.get()
        await request.body()
        return {"fields": context.fields, "fault": context.fault and context.fault.message}

    for path in (*STRICT, *BYPASSING, "/tokenize", "/invocations", "/v1/chat/completions"):
        app.post(path)(echo)
    return TestClient(app)


def encodings(body: dict) -> list[bytes]:
    """One body as different clients write it."""
    text = json.dumps(body)
    return [
        text.encode(),
        json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(),
        json.dumps(body, indent=1, separators=(",", " \n: ")).encode(),
        text.encode("utf-16"),
    ]


@pytest.mark.parametrize("path", BYPASSING)
def test_endpoints_without_the_hook_refuse_slips_too(http, path):
    draw = random.Random(path)
    for key in bad_keys():
        body = {"prompt": 'A {"be_id": 1}', **at(draw_place(draw, key), key)}
        answer = http.post(path, content=draw.choice(encodings(body)))
        assert answer.status_code == 400, body
        error = answer.json()["error"]
        assert error["param"].endswith(key)
        assert f"{path} cannot use a token" in error["message"]
        assert "/v1/chat/completions" in error["message"]
    for key in innocent_keys():
        body = {"prompt": 'A {"be_id": 1}', **at(draw.choice(EVERYWHERE), key)}
        assert http.post(path, content=draw.choice(encodings(body))).status_code == 200, body
    for key in NEAR_BY_CHANCE:
        assert http.post(path, json={"prompt": "x", **at(draw.choice(OTHERS), key)}).status_code == 200
    for place in ("metadata", "chat_template_kwargs", "extra_body"):
        assert http.post(path, json=at(place, "be_id")).status_code == 400
    for value in ('{"be_id": "x"}', [{"be_id": "x"}], {"extra_body": {"be_id": "x"}}):
        assert http.post(path, json={"extra_body": value}).status_code == 400
    for value in (None, "be_id", [], 7):
        assert http.post(path, json={"metadata": value, "vllm_xargs": value}).status_code == 200
    assert http.post(path, json={"be_match": False, "be-id": "x"}).status_code == 400
    # PHP writes slashes with an escape.
    assert http.post(path, content=b'{"model": "org\\/tiny:harbor"}').status_code == 400


@pytest.mark.parametrize("path", STRICT)
def test_messages_carry_the_fault_to_the_hook(http, path):
    draw = random.Random(path)
    for key in bad_keys():
        answer = http.post(path, content=draw.choice(encodings(at(draw_place(draw, key), key)))).json()
        assert f"{key}` is not read; send `" in answer["fault"]
    for key in innocent_keys():
        answer = http.post(path, content=draw.choice(encodings(at(draw.choice(EVERYWHERE), key)))).json()
        assert answer == {"fields": {}, "fault": None}
    named = {"be_id": "harbor", "be_system": "append"}
    for body in (named, {"vllm_xargs": named}, {"be_id": "harbor", "vllm_xargs": {**named, "seed": 1}}):
        assert http.post(path, json=body).json() == {"fields": named, "fault": None}
    twice = http.post(path, json={"be_id": "harbor", "vllm_xargs": {"be_id": "cook"}}).json()
    assert twice["fault"] == "`be_id` is given twice with different values; send it once."
    for place in ("metadata", "chat_template_kwargs", "extra_body"):
        assert f"{place}.be_id" in http.post(path, json=at(place, "be_id")).json()["fault"]


async def test_a_fault_is_raised_in_the_hook(tmp_path, context):
    hook, _, _ = make_hook(tmp_path)
    context.fault = MisnamedField("found before")
    with pytest.raises(BEError, match="found before"):
        await hook.begin(request(), USER, None)


def test_tokenize_of_text_names_no_token(http):
    for body in ({"be_id": "harbor"}, {"be-id": "harbor"}, {"metadata": {"be_id": "harbor"}}):
        refused = http.post("/tokenize", json={"prompt": "messages", **body})
        assert refused.status_code == 400, body
        assert "/tokenize with a `prompt` cannot use a token" in refused.json()["error"]["message"]
        assert http.post("/tokenize", json={"messages": USER, **body}).status_code == 200  # the hook's
        assert http.post("/tokenize", json={"prompt": "x", "messages": USER, **body}).status_code == 400
    assert http.post("/tokenize", json={"prompt": 'say "be_id": 1', "model": "org/tiny:harbor"}).status_code == 200


@pytest.mark.parametrize("path", [*STRICT, *BYPASSING, "/tokenize"])
def test_no_path_with_a_control_character_is_answered(http, path):
    """Starlette's router finds the route of `path` for `path` with a final newline, too."""
    for spelling in (f"{path}%0A", f"{path}%0a", f"{path}%0A%0A", f"{path}%0D", f"/%0A{path[1:]}", f"{path}%7f"):
        for body in ({"be_id": "harbor"}, {"model": "org/tiny:harbor"}, {"prompt": "x"}):
            answer = http.post(spelling, json=body)
            assert answer.status_code == 404, spelling
            assert answer.json()["error"] == {
                "message": "The path contains a control character, and no route has one; remove it (such as `%0A`).",
                "type": "NotFoundError",
                "param": None,
                "code": 404,
            }
    assert http.get(f"{path}%0A").status_code == 404


@pytest.mark.parametrize("name", ["X-Amzn-SageMaker-Adapter-Identifier", "x-amzn-sagemaker-adapter-identifier"])
def test_sagemakers_header_names_no_token(http, name):
    """/invocations writes it into `model` after the middleware has read the body."""
    for body in ({"messages": USER}, {"prompt": "x"}, {"model": "org/tiny", "prompt": "x"}):
        answer = http.post("/invocations", json=body, headers={name: "org/tiny:harbor"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "X-Amzn-SageMaker-Adapter-Identifier"
        assert "/invocations cannot use a token" in answer.json()["error"]["message"]
        assert http.post("/invocations", json=body, headers={name: "my-lora"}).status_code == 200
        assert http.post("/invocations", json=body, headers={name: "org/tiny"}).status_code == 200
    twice = [(name, "my-lora"), (name, "org/tiny:harbor")]
    assert http.post("/invocations", json={"prompt": "x"}, headers=twice).status_code == 400
    upload = {name: "org/tiny:harbor", "content-type": "multipart/form-data"}
    assert http.post("/invocations", content=b"{}", headers=upload).status_code == 400


@pytest.mark.parametrize("path", [*STRICT, *BYPASSING, "/tokenize", "/v1/chat/completions", "/invocations"])
def test_a_field_in_a_header_or_the_query_is_refused(http, path):
    """Neither is read. A chat with one of them must not be answered without its prompt."""

    def fault(url, **options):
        answer = http.post(url, json={"messages": USER}, **options)
        if path in STRICT:  # the hook raises it, in the endpoint's shape
            assert answer.status_code == 200
            return answer.json()["fault"]
        return answer.json()["error"]["message"] if answer.status_code == 400 else None

    for field in FIELDS:
        for name in (f"x-{field.replace('_', '-')}", f"X-{field.upper()}", field, field.replace("_", "-")):
            assert f"send `{field}` at the top level" in fault(path, headers={name: "harbor"}), name
        for query in (f"{field}=harbor", f"a=1&{field.upper()}=", f"{field}%5B%5D=x", field.replace("_", "%2D") + "=x"):
            found = fault(f"{path}?{query}")
            assert "The query parameter `" in found
            assert f"send `{field}` at the top level" in found
    for name in ("X-BE-Key", "x-be-digest", "x-request-id", "x-bid", "bed"):
        assert fault(path, headers={name: "x"}) is None
        assert fault(f"{path}?{name}=x") is None


def test_a_field_in_a_header_elsewhere_is_left_alone(http):
    assert http.get("/v1/models", headers={"x-be-id": "harbor"}).status_code == 404
    assert http.post("/v1/be/tokens?be_id=x", headers={"x-be-id": "harbor"}).status_code == 404


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_a_large_body_is_searched_in_a_thread(http, monkeypatch, path):
    """The event loop serves all other requests of the process."""
    searched = []

    def may_name(body):
        searched.append(asyncio._get_running_loop() is not None)
        return found(body)

    found = middleware._may_name_a_field
    monkeypatch.setattr(middleware, "_may_name_a_field", may_name)
    for size, on_loop in ((10, True), (1_000_001, False)):
        searched.clear()
        answer = http.post(path, json={"prompt": "x" * size, "be-id": "harbor"})
        assert "be-id" in (answer.json()["fault"] if path in STRICT else answer.json()["error"]["message"])
        assert searched == [on_loop]


def test_half_a_surrogate_pair_can_be_told(http):
    answer = http.post("/v1/completions", content=b'{"be\\ud800id": "x"}')
    assert answer.status_code == 400
    assert "be?id" in answer.json()["error"]["message"]


# --- other ways in ---


def test_llm_refuses_slips_before_it_does_anything():
    from be_serve.llm import LLM

    for options in ({"be_ids": "captain"}, {"chat_template_kwargs": {"be_id": "captain"}}):
        with pytest.raises(MisnamedField, match="as an argument of `chat`"):
            LLM.chat(None, USER, **options)
