"""The arithmetic of the load benchmark; it runs against real servers in tests/integration."""

from __future__ import annotations

import pytest

from benchmarks.client import Sample
from benchmarks.load import Burst, LoadOptions, LoadRun
from benchmarks.servers import ServerOptions


def sample(itl=0.02, ttft=0.1, error=""):
    return Sample(0.0, ttft=ttft, itls=[itl] * 3, completion_tokens=4, error=error)


def make_run(tmp_path, bursts, **changes):
    options = LoadOptions("m", tmp_path, tmp_path, ServerOptions("m"), concurrency=2, **changes)
    return LoadRun(options, bursts=bursts)


def test_figures_of_a_burst():
    figures = Burst(2.0, [sample(), sample(itl=0.04, ttft=0.3)]).figures()
    assert figures == pytest.approx({"tokens_per_s": 4.0, "itl_ms": 30.0, "ttft_ms": 200.0})
    assert Burst(2.0, [sample(), sample(error="HTTP 500")]).figures() is None


def test_rounds_are_compared_whole(tmp_path):
    fast, slow = Burst(1.0, [sample(), sample()]), Burst(2.0, [sample(0.04), sample(0.04)])
    failed = Burst(1.0, [sample(), sample(error="HTTP 503: busy")])
    rounds = [{"plain": slow, "plain_other": fast, "be": fast}] * 5 + [
        {"plain": failed, "plain_other": fast, "be": fast},  # a failure takes its round along
        {"plain_other": fast},  # interrupted
    ]
    result = make_run(tmp_path, rounds).result()
    assert (result["rounds"], result["failed_chats"], result["errors"]) == (5, 1, ["HTTP 503: busy"])
    assert result["ratios"]["plain/plain_other"]["tokens_per_s"]["of_medians"] == pytest.approx(0.5)
    assert result["ratios"]["plain/plain_other"]["itl_ms"]["of_medians_ci95"] == pytest.approx((2.0, 2.0))
    assert result["ratios"]["be/plain"]["tokens_per_s"]["of_medians"] == pytest.approx(2.0)
    assert "be/be_other" not in result["ratios"]


def test_nothing_measured_is_no_figure(tmp_path):
    result = make_run(tmp_path, [], other="prompt-embeds").result()
    assert (result["rounds"], result["arms"], result["ratios"]) == (0, {}, {})
