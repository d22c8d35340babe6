"""The arithmetic of the load benchmark; it runs against real servers in tests/integration."""

from __future__ import annotations

import pytest

from benchmarks.common.client import Sample
from benchmarks.common.servers import ServerOptions
from benchmarks.load import LoadOptions, LoadRun
from benchmarks.load.chart import draw
from benchmarks.load.figures import Burst, Round, load_figures, read_histogram, shares, within


def sample(itl=0.02, ttft=0.1, error=""):
    return Sample(0.0, ttft=ttft, itls=[itl] * 3, completion_tokens=4, error=error)


def make_figures(tmp_path, rounds, **changes):
    options = LoadOptions("m", tmp_path, tmp_path, ServerOptions("m"), concurrency=2, **changes)
    return load_figures(options, rounds)


def test_figures_of_a_burst():
    figures = Burst(2.0, [sample(), sample(itl=0.04, ttft=0.3)], cpu_seconds=0.05).figures()
    expected = {"tokens_per_s": 4.0, "itl_ms": 30.0, "ttft_ms": 200.0, "http_cpu_ms": 25.0}
    assert figures == pytest.approx(expected)
    assert "http_cpu_ms" not in Burst(2.0, [sample()]).figures()
    assert Burst(2.0, [sample(), sample(error="HTTP 500")]).figures() is None


def test_rounds_are_compared_whole(tmp_path):
    fast, slow = Burst(1.0, [sample(), sample()]), Burst(2.0, [sample(0.04), sample(0.04)])
    failed = Burst(1.0, [sample(), sample(error="HTTP 503: busy")])
    usual = {"plain": slow, "plain_other": fast, "be": fast, "again_other": fast}
    rounds = [Round(0, usual)] * 5 + [
        Round(0, {**usual, "plain": failed}),  # a failure takes its round along
        Round(0, {"plain_other": fast}),  # interrupted
    ]
    result = make_figures(tmp_path, rounds)
    assert (result["rounds"], result["failed_chats"], result["errors"]) == (5, 1, ["HTTP 503: busy"])
    assert result["ratios"]["plain/plain_other"]["tokens_per_s"]["of_medians"] == pytest.approx(0.5)
    assert result["ratios"]["plain/plain_other"]["itl_ms"]["of_medians_ci95"] == pytest.approx((2.0, 2.0))
    assert result["ratios"]["be/plain"]["tokens_per_s"]["of_medians"] == pytest.approx(2.0)
    assert result["ratios"]["again_other/plain_other"]["ttft_ms"]["of_medians"] == 1.0
    assert "be/be_other" not in result["ratios"]


def test_intervals_are_of_starts_where_there_are_several(tmp_path):
    """Ten rounds of one start agree to the last digit; that says nothing about the next start."""

    def rounds_of(start, seconds):
        other = Burst(1.0, [sample()])
        return [
            Round(start, {"plain": Burst(seconds, [sample()]), "be": other, "plain_other": other, "be_other": other})
        ]

    rounds = [one for start, seconds in enumerate((1.0, 1.1, 0.9)) for one in 10 * rounds_of(start, seconds)]
    result = make_figures(tmp_path, rounds, other="prompt-embeds")
    assert (result["rounds"], result["starts"]) == (30, 3)
    ratio = result["ratios"]["plain/plain_other"]["tokens_per_s"]
    assert ratio["of_medians"] == pytest.approx(1.0)
    assert ratio["of_medians_ci95"] == pytest.approx((1 / 1.1, 1 / 0.9))
    assert ratio["of_medians_by_start"] == pytest.approx([1.0, 1 / 1.1, 1 / 0.9])
    assert result["ratios"]["be/be_other"]["tokens_per_s"]["of_medians_ci95"] == pytest.approx((1.0, 1.0))


def test_the_chart_is_a_picture(tmp_path):
    burst = Burst(1.0, [sample()])
    for other in ("stock", "prompt-embeds"):
        run = LoadRun(LoadOptions("m", tmp_path, tmp_path, ServerOptions("m"), other=other))
        run.rounds = [Round(i % 2, dict.fromkeys(run.options.arms, burst)) for i in range(4)]
        file = tmp_path / f"{other}.png"
        draw(run.result(), file)
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 10_000


def test_nothing_measured_is_no_figure(tmp_path):
    result = make_figures(tmp_path, [], other="prompt-embeds")
    assert (result["rounds"], result["arms"], result["ratios"]) == (0, {}, {})


@pytest.mark.parametrize(("rounds", "starts", "shares"), [(10, 4, [3, 3, 2, 2]), (2, 8, [1, 1]), (3, 1, [3])])
def test_rounds_are_spread_over_starts(tmp_path, rounds, starts, shares):
    options = LoadOptions("m", tmp_path, tmp_path, ServerOptions("m"), rounds=rounds, starts=starts)
    assert options.shares == shares


def test_the_servers_histogram_is_read():
    text = """# HELP x_seconds about
x_seconds_bucket{le="0.001"} 3.0
x_seconds_bucket{le="0.01"} 4.0
x_seconds_bucket{le="+Inf"} 4.0
x_seconds_sum 0.2
y_seconds_bucket{le="0.001"} 9.0
"""
    found = shares(read_histogram(text, "x_seconds"))
    assert found == {"0.001": 0.75, "0.01": 1.0, "+Inf": 1.0}
    assert (within(found, 0.5), within(found, 0.99)) == ("0.001", "0.01")
    assert shares(read_histogram(text, "z_seconds")) is None


def test_the_result_holds_no_secret_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["be-serve", "bench", "load", "--server-arg=--hf-token hunter2 --port 1"])
    options = LoadOptions("m", tmp_path, tmp_path, ServerOptions("m", ("--hf-token", "hunter2")))
    result = LoadRun(options).result()
    assert result["command"][-1] == "--server-arg=--hf-token *** --port 1"
    assert "hunter2" not in str(result)
