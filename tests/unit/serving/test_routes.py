"""The admin routes and the middleware on a real FastAPI app and registry, without vLLM."""

from __future__ import annotations

import asyncio
from functools import partial

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from be_serve.client import BEClient
from be_serve.core.artifact import Token
from be_serve.core.errors import (
    ArtifactTooLarge,
    BEError,
    InputError,
    RowsBusy,
    ServerRefused,
    TooManyVectors,
    WrongModel,
)
from be_serve.serving import middleware, routes
from be_serve.serving.metrics import metrics
from be_serve.serving.middleware import BEMiddleware, current
from be_serve.serving.service import ServedModel, Service
from be_serve.serving.settings import Settings
from tests.factories import FINGERPRINT, make_token

KEY = {"X-BE-Key": "secret"}


def make_app(tmp_path, *, admin_key="secret", vllm_key=False, max_upload=100_000, capacity=None) -> FastAPI:
    app = FastAPI()
    app.include_router(routes.router)
    app.add_exception_handler(BEError, routes.be_error_handler)
    app.add_middleware(
        BEMiddleware, base_models=lambda: ["tiny"], metrics=metrics, is_route=partial(routes.is_post_route, app)
    )
    settings = Settings(registry=f"sqlite:///{tmp_path / 'r.db'}", admin_key=admin_key, max_upload=max_upload)
    model = ServedModel("tiny", FINGERPRINT, 8, 100, "bfloat16")
    service = Service(
        settings, model, metrics(), prepare=lambda t: t.vectors, vllm_has_api_key=vllm_key, capacity=capacity
    )
    service.index.refresh()
    app.state.be_serve = service

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def echo(request: Request):
        context = current.get()
        context.outcomes.append({"x-be-id": "seen"})
        return {"body": await request.json(), "supported": context.supported}

    return app


@pytest.fixture
def http(tmp_path):
    return TestClient(make_app(tmp_path))


def test_register_list_show_remove(http):
    data = make_token().to_bytes()
    answer = http.post("/v1/be/tokens?match=true", content=data, headers=KEY)
    assert answer.status_code == 201
    assert answer.json()["id"] == "harbor"
    assert answer.json()["match"] is True
    assert http.post("/v1/be/tokens", content=data, headers=KEY).status_code == 200
    assert http.post("/v1/be/tokens", content=make_token(seed=9).to_bytes(), headers=KEY).status_code == 409
    replaced = http.post("/v1/be/tokens?replace=true", content=make_token(seed=9).to_bytes(), headers=KEY)
    assert (replaced.status_code, replaced.json()["version"]) == (201, 2)
    assert http.post("/v1/be/tokens?id=second", content=data, headers=KEY).json()["id"] == "second"
    conflict = http.post("/v1/be/tokens?id=second&match=true", content=data, headers=KEY)
    assert conflict.status_code == 409
    listed = http.get("/v1/be/tokens", headers=KEY).json()
    assert [t["id"] for t in listed["data"]] == ["harbor", "second"]
    assert "vectors" not in str(listed)
    assert http.get("/v1/be/tokens/harbor", headers=KEY).json()["version"] == 2
    assert http.delete("/v1/be/tokens/harbor", headers=KEY).json() == {"id": "harbor", "deleted": True}
    assert http.get("/v1/be/tokens/harbor", headers=KEY).status_code == 404
    assert http.delete("/v1/be/tokens/harbor", headers=KEY).status_code == 404


def test_a_token_that_no_request_could_use_is_refused_at_once(tmp_path):
    app = make_app(tmp_path, capacity=1)
    refused = TestClient(app).post("/v1/be/tokens", content=make_token(k=2).to_bytes(), headers=KEY)
    assert refused.status_code == 422
    assert "2 vectors" in refused.json()["error"]["message"]
    assert "1 rows" in refused.json()["error"]["message"]
    # Registered through a larger server on the same registry: refused by its manifest, and not listed here.
    large = TestClient(make_app(tmp_path))
    assert large.post("/v1/be/tokens", content=make_token(k=2).to_bytes(), headers=KEY).status_code == 201
    service = app.state.be_serve
    service.index.refresh()
    assert service.listed() == []
    with pytest.raises(TooManyVectors):
        service.index.load(service.index.get("harbor"))


@pytest.fixture
def parses(monkeypatch):
    """Sizes of the token files that were parsed, in order."""
    sizes, parse = [], Token.from_bytes

    def from_bytes(data, **options):
        sizes.append(len(data))
        return parse(data, **options)

    monkeypatch.setattr(Token, "from_bytes", from_bytes)
    return sizes


def test_an_upload_is_parsed_once_and_once_on_each_replica(tmp_path, parses):
    app, replica = make_app(tmp_path), make_app(tmp_path).state.be_serve
    token, index = make_token(), app.state.be_serve.index
    data = token.to_bytes()
    assert TestClient(app).post("/v1/be/tokens", content=data, headers=KEY).status_code == 201
    record = index.get("harbor")
    ready = index.cached(record)
    assert ready is not None
    assert index.load(record) is ready
    assert parses == [len(data)]
    replica.index.refresh()
    for _ in range(2):
        assert (replica.index.load(replica.index.get("harbor")) == ready).all()
    assert parses == [len(data)] * 2
    assert index._cache.used == replica.index._cache.used == len(data)


def test_an_upload_again_and_under_another_id_shares_its_vectors(tmp_path, parses):
    app = make_app(tmp_path)
    http, index, data = TestClient(app), app.state.be_serve.index, make_token().to_bytes()
    assert http.post("/v1/be/tokens", content=data, headers=KEY).status_code == 201
    ready = index.cached(index.get("harbor"))
    assert http.post("/v1/be/tokens", content=data, headers=KEY).status_code == 200
    assert http.post("/v1/be/tokens?id=second", content=data, headers=KEY).status_code == 201
    assert index.cached(index.get("harbor")) is index.cached(index.get("second")) is ready
    assert (len(parses), index._cache.used) == (3, len(data))


def test_a_refused_upload_leaves_no_vectors(tmp_path):
    app = make_app(tmp_path)
    http, index = TestClient(app), app.state.be_serve.index
    assert http.post("/v1/be/tokens", content=make_token().to_bytes(), headers=KEY).status_code == 201
    used = index._cache.used
    assert http.post("/v1/be/tokens", content=make_token(seed=9).to_bytes(), headers=KEY).status_code == 409
    assert index._cache.used == used


def test_a_token_larger_than_the_memory_for_vectors_is_read_when_it_is_used(tmp_path):
    app = make_app(tmp_path)
    index = app.state.be_serve.index
    index._cache.capacity = 10
    assert TestClient(app).post("/v1/be/tokens", content=make_token().to_bytes(), headers=KEY).status_code == 201
    assert index.cached(index.get("harbor")) is None
    assert (index.load(index.get("harbor")) == make_token().vectors).all()


def test_the_registrys_own_limit_holds_for_uploads(tmp_path, monkeypatch):
    """Other processes read the file back under it."""
    monkeypatch.setattr("be_serve.serving.service.MAX_BYTES", 100)
    refused = TestClient(make_app(tmp_path)).post("/v1/be/tokens", content=make_token().to_bytes(), headers=KEY)
    assert refused.status_code == 413
    assert "at most 100 are accepted" in refused.json()["error"]["message"]


def test_another_models_token_is_refused_before_it_is_read(tmp_path, monkeypatch):
    service = make_app(tmp_path).state.be_serve
    stranger = FINGERPRINT.model_copy(update={"config": "f" * 16})
    service.registry.put(make_token(fingerprint=stranger).to_bytes())
    service.index.refresh()
    monkeypatch.setattr(service.registry, "read_artifact", None)
    with pytest.raises(WrongModel):
        service.index.load(service.index.get("harbor"))


def test_who_may_try_again_is_told_when(tmp_path):
    app = make_app(tmp_path)

    @app.get("/busy")
    async def busy():
        raise RowsBusy("All rows are in use.")

    answer = TestClient(app).get("/busy")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_refused_uploads_name_the_reason(http):
    stranger = FINGERPRINT.model_copy(update={"config": "f" * 16})
    wrong = http.post("/v1/be/tokens", content=make_token(fingerprint=stranger).to_bytes(), headers=KEY)
    assert wrong.status_code == 422
    message = wrong.json()["error"]["message"]
    assert str(stranger) in message
    assert str(FINGERPRINT) in message
    for bad in (b"", b"junk", make_token().to_bytes()[:-1]):
        answer = http.post("/v1/be/tokens", content=bad, headers=KEY)
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == 422
    assert http.post("/v1/be/tokens?id=Bad", content=make_token().to_bytes(), headers=KEY).status_code == 400
    big = http.post("/v1/be/tokens", content=b"x" * 100_001, headers=KEY)
    assert big.status_code == 413
    chunked = http.post("/v1/be/tokens", content=iter([b"x" * 60_000, b"x" * 60_000]), headers=KEY)
    assert chunked.status_code == 413
    assert http.get("/v1/be/tokens", headers=KEY).json()["data"] == []


def refusals() -> dict[str, float]:
    """The counter's values by code."""
    samples = [sample for family in metrics().refusals.collect() for sample in family.samples]
    return {s.labels["code"]: s.value for s in samples if s.name.endswith("_total")}


def test_refusals_of_the_admin_routes_are_counted(http):
    data = make_token().to_bytes()
    http.post("/v1/be/tokens", content=data, headers=KEY)
    before = refusals()
    http.get("/v1/be/tokens")
    http.get("/v1/be/tokens", headers={"X-BE-Key": "wrong"})
    http.get("/v1/be/tokens/nobody", headers=KEY)
    http.post("/v1/be/tokens", content=b"junk", headers=KEY)
    http.post("/v1/be/tokens", content=make_token(seed=9).to_bytes(), headers=KEY)
    http.put("/v1/be/tokens/harbor/prompt", content=b"\xff", headers=KEY)
    http.delete("/v1/be/tokens/nobody", headers=KEY)
    http.delete("/v1/be/tokens/harbor", headers=KEY)  # not refused
    grown = {code: value - before.get(code, 0) for code, value in refusals().items()}
    assert {code: value for code, value in grown.items() if value} == {
        "be_not_authenticated": 1,
        "be_forbidden": 1,
        "be_not_found": 2,
        "be_invalid_artifact": 2,
        "be_conflict": 1,
    }


def test_keys(tmp_path):
    open_app = TestClient(make_app(tmp_path / "a"))
    assert open_app.get("/v1/be/tokens").status_code == 401
    assert open_app.get("/v1/be/tokens", headers={"X-BE-Key": "wrong"}).status_code == 403
    assert open_app.get("/v1/be/tokens", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert open_app.get("/v1/be/tokens", headers={"Authorization": "Basic secret"}).status_code == 401
    behind_vllm_key = TestClient(make_app(tmp_path / "b", vllm_key=True))
    assert behind_vllm_key.get("/v1/be/tokens", headers={"Authorization": "Bearer secret"}).status_code == 401
    assert behind_vllm_key.get("/v1/be/tokens", headers=KEY).status_code == 200
    closed = TestClient(make_app(tmp_path / "c", admin_key=None))
    assert closed.get("/v1/be/tokens", headers=KEY).status_code == 403


def test_a_token_file_cannot_choose_the_template(http):
    """A manifest may pin known variables only: a chat_template in it would be a program."""
    data = make_token().to_bytes()
    for bad in ('{"chat_template":"x"}', '{"date_string":"' + "x" * 65 + '"}', '{"tools":[]}'):
        header = int.from_bytes(data[:8], "little")
        old = data[8 : 8 + header].decode()
        new = old.replace('\\"template_kwargs\\":{}', '\\"template_kwargs\\":' + bad.replace('"', '\\"'))
        assert new != old
        raw = new.encode()
        forged = len(raw).to_bytes(8, "little") + raw + data[8 + header :]
        answer = http.post("/v1/be/tokens", content=forged, headers=KEY)
        assert answer.status_code == 422, bad
        assert "template_kwargs" in answer.json()["error"]["message"]


def test_openapi_lists_the_routes(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/be/tokens"]) == {"post", "get"}
    assert set(paths["/v1/be/tokens/{be_id}"]) == {"get", "delete"}


def test_endpoints_that_would_ignore_a_token_refuse_it(http):
    for body in ({"be_id": "x"}, {"model": "tiny:x"}, {"be_system": "append"}, {"vllm_xargs": {"be_id": "x"}}):
        answer = http.post("/v1/completions", json={"prompt": "hi", **body})
        assert answer.status_code == 400, body
        assert "cannot use a token" in answer.json()["error"]["message"]
    escaped = ['{"\\u0062e_id": "x"}', '{"model": "tiny\\u003ax"}']
    for raw in (*(text.encode() for text in escaped), '{"be_id": "x"}'.encode("utf-16")):
        for kind in ("application/json", "application/json; x=multipart"):
            answer = http.post("/v1/completions", content=raw, headers={"content-type": kind})
            assert answer.status_code == 400, raw
    for body in ({}, {"be_id": None}, {"be_match": False}, {"prompt": 'say "be_id" and tiny:x'}):
        answer = http.post("/v1/completions", json=body)
        assert answer.json() == {"body": body, "supported": False}


@pytest.mark.parametrize(("root", "prefixes"), [("/llm", ("", "/llm")), ("/v", ("", "/v")), ("/v1", ("/v1",))])
def test_a_root_path_hides_no_route(tmp_path, root, prefixes):
    """As the router does it: the path may come with the prefix or without, and /v1 does not lie below /v."""
    app = make_app(tmp_path)
    app.root_path = root
    http = TestClient(app)
    for prefix in prefixes:
        refused = http.post(f"{prefix}/v1/completions", json={"model": "tiny", "be_id": "harbor"})
        assert refused.status_code == 400, prefix
        served = http.post(f"{prefix}/v1/chat/completions", json={"model": "tiny", "be_id": "harbor"})
        assert served.json()["supported"], prefix


def test_headers_come_out_of_the_handler(http):
    answer = http.post("/v1/chat/completions", json={"be_id": "x"})
    assert answer.json()["supported"] is True
    assert answer.headers["x-be-id"] == "seen"


async def test_a_client_that_takes_nothing_loses_what_it_holds(monkeypatch):
    """Rows and memory are held until the answer is taken; whoever never reads would keep them from everybody."""
    monkeypatch.setattr(middleware, "_SEND_SECONDS", 0.1)
    given_back = []

    async def app(scope, receive, send):
        if scope["path"] == "/v1/chat/completions":
            current.get().cleanup.append(lambda: given_back.append(scope["path"]))
        for _ in range(8):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def ask(path, delay):
        async def send(message):
            await asyncio.sleep(delay)

        wrapped = BEMiddleware(app, base_models=list, metrics=metrics, is_route=lambda path: False)
        await wrapped({"type": "http", "method": "POST", "path": path, "headers": []}, None, send)

    await ask("/v1/chat/completions", 0.001)
    assert len(given_back) == 1
    for delay in (10, 0.03):  # none of it, or a little now and then
        with pytest.raises(TimeoutError):
            await ask("/v1/chat/completions", delay)
    assert len(given_back) == 3
    await ask("/v1/responses", 0.03)  # holds nothing, and is vLLM's own affair


def test_the_admin_key_goes_by_no_proxy_to_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for url, proxied in (("http://localhost:1", 0), ("http://127.0.0.1:1/v1", 0), ("http://models.example", 1)):
        with BEClient(url, api_key="k") as client:
            assert bool(client._http._mounts) == bool(proxied), url


def test_client_speaks_to_the_routes(tmp_path, monkeypatch):
    app = TestClient(make_app(tmp_path))
    monkeypatch.setattr(httpx, "Client", lambda base_url, headers, **_: _bound(app, headers))
    file = tmp_path / "harbor.safetensors"
    make_token().save(file)
    with BEClient("http://testserver/v1/", api_key="secret") as client:
        manifest, created = client.register(file, match=True)
        assert (manifest["id"], created) == ("harbor", True)
        assert client.register(file)[1] is False
        assert [t["id"] for t in client.list()] == ["harbor"]
        assert client.show("harbor")["k"] == 2
        client.remove("harbor")
        with pytest.raises(ServerRefused, match="404"):
            client.show("harbor")
        with pytest.raises(InputError, match="No token file"):
            client.register(tmp_path / "none.safetensors")
    with BEClient("http://testserver", api_key="wrong") as client, pytest.raises(ServerRefused, match="403"):
        client.list()


def test_client_says_when_nobody_answers():
    with BEClient("http://127.0.0.1:9", api_key="k") as client, pytest.raises(InputError, match="No answer"):
        client.list()


def test_settings(tmp_path):
    settings = Settings.from_env({"BE_TOKEN": "a=/x\nb=/y=z", "BE_MATCH": "0", "BE_ADMIN_KEY": "k"})
    assert {i: str(p) for i, p in settings.tokens.items()} == {"a": "/x", "b": "/y=z"}
    assert (settings.match, settings.admin_key) == (False, "k")
    for env in ({"BE_TOKEN": "a"}, {"BE_MATCH": "maybe"}, {"BE_MAX_UPLOAD": "-1"}, {"BE_INJECTION": "magic"}):
        with pytest.raises((InputError, BEError)):
            Settings.from_env(env)
    assert ArtifactTooLarge.http_status == 413


def _bound(app: TestClient, headers: dict) -> TestClient:
    client = TestClient(app.app)
    client.headers.update(headers)
    return client
