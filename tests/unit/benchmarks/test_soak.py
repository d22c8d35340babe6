"""How the soak judges; the load itself runs against real servers only (`be-serve bench soak`)."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.common.answers import Answer, Count, answer_of
from benchmarks.common.machine import resident
from benchmarks.common.servers import ServerOptions
from benchmarks.soak import SoakOptions, SoakRun, summary
from benchmarks.soak.answers import detectable_share
from benchmarks.soak.attacks import ATTACKS, Attacks
from benchmarks.soak.client import SoakClient
from benchmarks.soak.workload import Workload
from tests.factories import make_token

RIGHT = Answer(("Ahoy", ",", " sailor"), (frozenset(), frozenset({"!", ";"}), frozenset()))


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        (("Ahoy", ",", " sailor"), "right"),
        (("Ahoy", "!", " garbage"), "tie"),  # the way parts where the two likeliest were close
        (("Ahoy", "?", " sailor"), "wrong"),  # unlikely
        (("Ahoy", ";", " sailor"), "tie"),  # the third is as close
        (("Aye", ",", " sailor"), "wrong"),
        (("Ahoy", ",", " cat"), "wrong"),
        (("Ahoy",), "wrong"),
        ((), "wrong"),
        (("Ahoy", ",", " sailor", "!"), "wrong"),
    ],
)
def test_an_answer_that_departs_is_wrong_unless_it_took_a_close_second(tokens, outcome):
    count = Count()
    count.judge("token", RIGHT, Answer(tokens, (frozenset(),) * 4), {})
    found = {"right": count.right["token"], "tie": count.ties["token"], "wrong": len(count.wrong)}
    assert found == {name: int(name == outcome) for name in found}


def test_how_far_a_mix_up_would_show():
    near = Answer(("Ahoy", "!", " cat"), (frozenset(), frozenset({","}), frozenset()))
    far = Answer(("No",), (frozenset(),))
    assert detectable_share({("a", 0): RIGHT, ("b", 0): RIGHT}) == 0.0
    assert detectable_share({("a", 0): RIGHT, ("b", 0): near}) == 0.0  # either way the first difference is a tie
    assert detectable_share({("a", 0): RIGHT, ("b", 0): near, ("c", 0): far}) == pytest.approx(4 / 6)
    assert (
        detectable_share({("a", 0): RIGHT, ("b", 1): far, ("a", -1): far, ("b", -1): RIGHT}) == 0.0
    )  # no question in common


def options(**given) -> SoakOptions:
    made = {"model": "m", "folder": Path(), "out": Path(), "servers": ServerOptions("m"), **given}
    return SoakOptions(**made)


def test_growth_leaves_out_the_start():
    run = SoakRun(options())
    assert run.growth() is None
    assert run.slopes() == {}
    run.memory = [(n / 12, {"engine": 500.0 if n < 10 else 1000.0, "api": float(n)}) for n in range(100)]
    assert run.growth() == pytest.approx(1094.5 / 1014.5)
    assert run.slopes() == pytest.approx({"engine": 0.0, "api": 12.0})


def test_memory_is_counted_of_the_whole_group():
    own = Path("/proc/self/comm").read_text().strip()
    assert resident(os.getpgrp())[own] > 10 * 2**20
    assert resident(-1) == {}


class Server:
    """Answers with what `answer` makes of a path and a body, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str, dict], tuple[int, dict]]) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.answer = answer

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/v1/be/") and request.method in ("POST", "DELETE"):
            return httpx.Response({"POST": 201, "DELETE": 200}[request.method], json={})
        body = json.loads(request.content) if request.content else {}
        self.asked.append((request.url.path, body))
        if request.method == "GET" and "X-BE-Key" not in request.headers:
            body = {"shut": True}
        status, found = self.answer(request.url.path, body)
        return httpx.Response(status, json=found)


def cached(tokens: int) -> dict:
    return {"usage": {"prompt_tokens_details": {"cached_tokens": tokens}}}


def workload(server: Server) -> Workload:
    tokens = {}
    for n in range(2):
        text = f"You are {n}."
        tokens[f"soak-{n}"] = make_token(f"soak-{n}", k=8, hidden_size=32, seed=n, prompt=text, text=text)
    http = httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(server))
    references = {(be_id, q): RIGHT for be_id in tokens for q in range(-1, 4)}
    return Workload(SoakClient(options(tokens=2), http, "key", tokens, Count(), "m", vocabulary=100), references)


async def attack_all(server: Server) -> Count:
    clients = workload(server)
    rng = random.Random(0)
    await Attacks(clients.client).takeover(rng)
    for _ in range(200):
        await clients.attack(rng)
    return clients.client.count


class Refusing:
    """Does as be-serve does: refuses what it must, shows a manifest, and finds each token's own blocks."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, path: str, body: dict) -> tuple[int, dict]:
        if path.startswith("/v1/be/"):
            return (401, {}) if body else (200, {"id": "soak-0"})
        if body.get("cache_salt"):
            key = body["be_id"] + body["messages"][-1]["content"]
            found = 128 * (key in self.seen)
            self.seen.add(key)
            return 200, cached(found)
        return 400, {"error": {"message": "no"}}


async def test_a_server_that_refuses_is_not_reached():
    server = Server(Refusing())
    count = await attack_all(server)
    assert set(count.attempts) == set(ATTACKS)
    assert not count.succeeded.total()
    assert not count.failures
    assert not count.void
    ids = {
        "raw_ids": [i for path, body in server.asked if path == "/v1/completions" for i in body["prompt"]],
        "detokenize": [i for path, body in server.asked if path == "/detokenize" for i in body["tokens"]],
        "logit_bias": [int(i) for _, body in server.asked for i in body.get("logit_bias", {})],
        "allowed_ids": [i for _, body in server.asked for i in body.get("allowed_token_ids", [])],
    }
    rows = set(range(128 + 1024, 128 + 1024 + 48))  # 100 ids padded to 128, the gap, 48 rows
    for kind, sent in ids.items():
        assert len(set(sent)) > 5, kind
        assert set(sent) <= rows, kind


LOADED = {"vllm:num_preemptions_total": 3.0, "be_serve_row_writes_total": 90.0}


def clean_run(**given) -> SoakRun:
    run = SoakRun(options(), detectable=0.9, seconds=1800.0, metrics=dict(LOADED), **given)
    for kind in ("token", "plain", "long", "churn"):
        run.count.right[kind] = 50
    for kind in ATTACKS:
        run.count.attempts[kind] = 5
    return run


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda run: run.count.wrong.append({}), "1 wrong answers"),
        (lambda run: run.count.failures.update(["x"]), "1 server errors"),
        (lambda run: run.count.succeeded.update(["vector"]), "1 attacks succeeded"),
        (lambda run: run.count.right.pop("churn"), "no right answer of kind 'churn'"),
        (lambda run: run.count.attempts.pop("takeover"), "no attack of kind 'takeover'"),
        (lambda run: run.count.ties.update(token=20), "ties in 29% of answers with tokens, in 0% of plain answers"),
        (lambda run: setattr(run, "detectable", 0.2), "only 20% of mix-ups"),
        (lambda run: run.metrics.clear(), "no request was preempted"),
        (lambda run: run.metrics.update(be_serve_row_writes_total=24.0), "rows hardly changed"),
        (lambda run: run.memory.extend((n, {"a": 100.0 + n}) for n in range(100)), "memory grew to 1."),
    ],
)
def test_a_soak_is_clean_only_where_it_shows_something(spoil, fault):
    run = clean_run()
    assert run.faults() == []
    spoil(run)
    assert any(fault in found for found in run.faults()), run.faults()


async def test_a_server_that_gives_way_is_seen_to():
    numbers = [0.125] * 300
    count = await attack_all(Server(lambda path, body: (200, {"prompt": "<row>", **cached(128), "v": numbers})))
    assert count.succeeded == count.attempts
    assert set(count.attempts) == set(ATTACKS)


async def test_blocks_that_left_the_cache_prove_nothing():
    count = await attack_all(Server(lambda path, body: (200, {"prompt": "", **cached(0)})))
    assert count.void["blocks"] > 10
    assert not count.attempts["blocks"]


async def test_a_server_that_breaks_is_counted():
    count = await attack_all(Server(lambda path, body: (500, {"error": {"message": "broke"}})))
    for kind in ("raw_ids", "allowed_ids", "logit_bias", "prompt_logprobs", "detokenize"):
        assert count.failures[f"{kind}: HTTP 500: broke"] == count.attempts[kind], kind
    assert count.failures["blocks: HTTP 500: broke"] > 10


async def test_an_error_in_place_of_an_answer_is_a_failure():
    clients = workload(Server(lambda path, body: (503, {"error": {"message": "no room"}})))
    for name in ("token", "plain", "abort"):
        await getattr(clients, name)(random.Random(0))
    assert clients.client.count.failures == {f"{name}: HTTP 503: no room": 1 for name in ("token", "plain", "abort")}
    for seed in range(20):
        await clients.long(random.Random(seed))
    assert clients.client.count.failures["long: HTTP 503: no room"] > 5
    assert clients.client.count.failures["long, plain: HTTP 503: no room"] > 1


async def test_an_answer_of_another_form_is_a_failure_and_the_client_goes_on():
    clients = workload(Server(lambda path, body: (200, {"choices": [{"logprobs": None}]})))
    await clients.work(0, time.monotonic() + 0.2)
    assert clients.client.count.failures.total() > 5
    assert any("TypeError" in error for error in clients.client.count.failures)


def test_the_result_holds_no_secret_of_the_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["be-serve", "bench", "soak", "--server-arg", "--api-key hunter2 hunter3"])
    result = clean_run().result()
    assert result["command"][-1] == "--api-key *** ***"


def test_the_summary_names_what_went_wrong():
    run = clean_run()
    assert summary(run.result())[-1] == "clean"
    run.count.judge("token", RIGHT, RIGHT, {})
    run.count.failures["token: HTTP 503: no room"] = 2
    text = "\n".join(summary(run.result()))
    assert "201 right, 0 ties, 0 wrong" in text
    assert "2 x token: HTTP 503: no room" in text
    assert "FAULT: 2 server errors" in text


def test_an_answer_keeps_what_was_close_to_the_likeliest():
    top = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -1.2}, {"token": "c", "logprob": -1.5}]
    body = {"choices": [{"logprobs": {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": top}]}}]}
    assert answer_of(body) == Answer(("a",), (frozenset({"b"}),))
