"""How the soak judges; the load itself runs against real servers only (`be-serve bench soak`)."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks.servers import ServerOptions
from benchmarks.soak import ATTACKS, Answer, Count, SoakOptions, SoakRun, _Clients, _distinct, resident, summary
from tests.factories import make_token

RIGHT = Answer(("Ahoy", ",", " sailor"), (5.0, 0.1, 4.0))


@pytest.mark.parametrize(
    ("tokens", "outcome"),
    [
        (("Ahoy", ",", " sailor"), "right"),
        (("Ahoy", "!", " sailor"), "tie"),
        (("Fair", ",", " sailor"), "wrong"),
        (("Ahoy", ",", " cat"), "wrong"),
    ],
)
def test_an_answer_that_departs_is_wrong_unless_the_two_likeliest_were_close(tokens, outcome):
    count = Count()
    count.judge(RIGHT, Answer(tokens, (1.0,) * 3), {"token": "soak-0"})
    assert {"right": count.right, "tie": count.tie, "wrong": len(count.wrong)}[outcome] == 1
    assert count.right + count.tie + len(count.wrong) == 1


def test_a_cut_answer_is_no_right_answer():
    count = Count()
    count.judge(RIGHT, Answer(("Ahoy",), (5.0,)), {})
    assert not count.right


def test_how_far_a_mix_up_would_show():
    other = Answer(("No",), (1.0,))
    same = {("a", 0): RIGHT, ("b", 0): RIGHT, ("c", 0): other}
    assert _distinct(same) == pytest.approx(2 / 3)
    assert _distinct({("a", 0): RIGHT, ("b", 1): other}) == 0.0  # only answers to one question are compared


def options(**given) -> SoakOptions:
    made = {"model": "m", "folder": Path(), "out": Path(), "servers": ServerOptions("m"), **given}
    return SoakOptions(**made)


def test_growth_leaves_out_the_start():
    run = SoakRun(options())
    assert run.growth() is None
    run.memory = [(n / 12, 500.0 if n < 10 else 1000.0 + n) for n in range(100)]
    assert run.growth() == pytest.approx(1094.5 / 1014.5)


def test_memory_is_counted_of_the_whole_group():
    assert resident(os.getpgrp()) > 10 * 2**20
    assert resident(-1) == 0


class Server:
    """Answers everything with one status and body, and keeps what it was asked."""

    def __init__(self, status: int, body: dict) -> None:
        self.asked: list[tuple[str, dict]] = []
        self.status, self.body = status, body

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, json.loads(request.content) if request.content else {}))
        return httpx.Response(self.status, json=self.body)


def crowd(server: Server) -> _Clients:
    tokens = {}
    for n in range(2):
        text = f"You are {n}."
        tokens[f"soak-{n}"] = make_token(f"soak-{n}", seed=n, prompt=text, text=text)
    http = httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(server))
    references = {(be_id, q): RIGHT for be_id in tokens for q in range(4)}
    return _Clients(options(tokens=2), http, "key", tokens, references, Count(), "m", vocabulary=100)


async def attack_all(server: Server) -> Count:
    clients = crowd(server)
    rng = random.Random(0)
    while len(clients.count.attempts) < len(ATTACKS) or clients.count.attempts.total() < 60:
        await clients.attack(rng)
    return clients.count


async def test_a_server_that_refuses_is_not_reached():
    server = Server(400, {"error": {"message": "no"}})
    count = await attack_all(server)
    assert set(count.attempts) == set(ATTACKS)
    assert not count.succeeded.total()
    assert not count.failures
    assert all(body["prompt"][0] >= 100 for path, body in server.asked if path == "/v1/completions")


async def test_a_server_that_gives_way_is_seen_to():
    first = crowd(Server(200, {})).tokens["soak-0"].vectors
    second = crowd(Server(200, {})).tokens["soak-1"].vectors
    body = {
        "prompt": "<row>",
        "usage": {"prompt_tokens_details": {"cached_tokens": 128}},
        "vectors": [f"{x:.4f}" for x in np.concatenate([first[0], second[0]])],
    }
    count = await attack_all(Server(200, body))
    assert count.succeeded == count.attempts


async def test_a_server_that_breaks_is_counted():
    count = await attack_all(Server(500, {"error": {"message": "broke"}}))
    assert count.failures.total() == count.attempts.total()


async def test_an_error_in_place_of_an_answer_is_a_failure():
    clients = crowd(Server(503, {"error": {"message": "no room"}}))
    await clients.token(random.Random(0))
    await clients.long(random.Random(0))
    await clients.abort(random.Random(0))
    assert clients.count.failures == {
        "token: HTTP 503: no room": 1,
        "long: HTTP 503: no room": 1,
        "abort: HTTP 503: no room": 1,
    }


def test_the_summary_names_what_went_wrong():
    run = SoakRun(options())
    run.count.judge(RIGHT, RIGHT, {})
    run.count.failures["token: HTTP 503: no room"] = 2
    assert not run.clean
    text = "\n".join(summary(run.result()))
    assert "1 right, 0 ties, 0 wrong" in text
    assert "2 x token: HTTP 503: no room" in text
