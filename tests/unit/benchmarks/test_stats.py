"""The benchmark's arithmetic against values known beforehand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.common import stats


def test_describe_uses_vllm_names_and_linear_percentiles():
    found = stats.describe([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == {
        "mean_ttft_ms": 3.0,
        "median_ttft_ms": 3.0,
        "std_ttft_ms": pytest.approx(2**0.5),
        "p50_ttft_ms": 3.0,
        "p90_ttft_ms": pytest.approx(4.6),
        "p99_ttft_ms": pytest.approx(4.96),
    }
    assert set(stats.describe([], "e2el").values()) == {0.0}


@pytest.mark.parametrize(
    ("new", "question", "prompt", "expected"),
    [(1, 26, 337, 0.074), (1, 58, 1584, 0.036), (29, 26, 337, 0.152), (396, 58, 1584, 0.276), (132, 58, 1584, 0.116)],
)
def test_norm_flops_gives_the_papers_table_8(new, question, prompt, expected):
    assert stats.norm_flops(new, question, prompt) == pytest.approx(expected, abs=0.0006)


def test_eq_6_agrees_with_the_cost_model_it_is_derived_from():
    alpha, beta, prompt, question = 140.0, 0.95, 1584, 58
    fraction = stats.overhead_fraction(alpha, beta, prompt + question)
    measured = (alpha + beta * (1 + question)) / (alpha + beta * (prompt + question))
    assert stats.predicted_ratio(fraction, stats.norm_flops(1, question, prompt)) == pytest.approx(measured)
    assert stats.overhead_fraction(0.0, beta, 100) == 0.0


def test_fit_recovers_a_line_and_measures_the_distance_from_it():
    tokens = [80.0, 380.0, 1600.0, 3100.0]
    fit = stats.fit_linear(tokens, [60 + 0.9 * t for t in tokens])
    assert fit is not None
    assert (fit.alpha_ms, fit.beta_ms_per_token) == (pytest.approx(60), pytest.approx(0.9))
    assert fit.largest_relative_residual == pytest.approx(0, abs=1e-9)
    assert fit.predict(100) == pytest.approx(150)
    bent = stats.fit_linear(tokens, [60 + 0.9 * t + 1e-4 * t * t for t in tokens])
    assert bent is not None
    assert bent.largest_relative_residual > 0.02


def test_fit_needs_two_lengths():
    assert stats.fit_linear([50.0, 50.0], [10.0, 11.0]) is None


def test_fit_lets_no_long_prompt_decide_alone():
    """The relative error is what is minimised: an unweighted line misses the short prompts by far more."""
    tokens, times = np.array([80.0, 100.0, 380.0, 3100.0]), np.array([140.0, 160.0, 440.0, 4200.0])
    fit = stats.fit_linear(tokens, times)
    assert fit is not None
    slope, intercept = np.polyfit(tokens, times, 1)
    unweighted = np.abs((intercept + slope * tokens) / times - 1).max()
    assert fit.largest_relative_residual < unweighted / 2


def test_paired_ratio_of_a_constant_factor_has_no_spread():
    rng = np.random.default_rng(1)
    below = rng.lognormal(5, 0.4, size=40)
    ratio = stats.paired_ratio(below * 0.25, below)
    for value in (ratio.of_medians, ratio.median_of_ratios, *ratio.median_of_ratios_ci95, *ratio.of_medians_ci95):
        assert value == pytest.approx(0.25)
    assert ratio.pairs == 40


def test_paired_ratio_keeps_rounds_together():
    """A drift shared by both arms widens an unpaired interval, not a paired one."""
    rng = np.random.default_rng(2)
    drift = np.linspace(1.0, 5.0, 60)
    a, b = drift * rng.normal(1, 0.01, 60), drift * rng.normal(1, 0.01, 60)
    low, high = stats.paired_ratio(a, b).median_of_ratios_ci95
    assert low < 1 < high
    assert high - low < 0.02


def test_paired_ratio_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        a, b = rng.lognormal(0, 0.2, 50) * 0.5, rng.lognormal(0, 0.2, 50)
        low, high = stats.paired_ratio(a, b, seed=trial, resamples=500).of_medians_ci95
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 200 <= 1.0


def test_pairs_of_one_round_do_not_pass_for_independent_ones():
    """Ten copies of a pair hold no more than the pair: the interval must not shrink."""
    rng = np.random.default_rng(4)
    a, b = rng.lognormal(0, 0.3, 30), rng.lognormal(0, 0.3, 30)
    single = stats.paired_ratio(a, b)
    rounds = np.repeat(np.arange(30), 10)
    grouped = stats.paired_ratio(np.repeat(a, 10), np.repeat(b, 10), rounds=rounds.tolist())
    apart = stats.paired_ratio(np.repeat(a, 10), np.repeat(b, 10))

    def width(ratio):
        return ratio.of_medians_ci95[1] - ratio.of_medians_ci95[0]

    assert width(grouped) == pytest.approx(width(single), rel=0.1)
    assert width(apart) < width(single) / 2


def test_rounds_of_unequal_size():
    """A failed request leaves its round with fewer pairs."""
    ratio = stats.paired_ratio([1.0, 1.0, 2.0, 4.0], [2.0, 2.0, 4.0, 8.0], rounds=[0, 0, 1, 2])
    assert ratio.pairs == 4
    assert ratio.median_of_ratios_ci95 == (0.5, 0.5)
    assert np.isfinite(ratio.of_medians_ci95).all()


def test_paired_ratio_repeats_under_one_seed():
    a, b = [1.0, 2.0, 3.0, 5.0], [2.0, 3.0, 5.0, 7.0]
    assert stats.paired_ratio(a, b, seed=7) == stats.paired_ratio(a, b, seed=7)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_paired_ratio_refuses_series_that_are_no_pairs(a, b):
    with pytest.raises(ValueError, match="equally long"):
        stats.paired_ratio(a, b)


def test_the_order_of_starts_cancels():
    """Whoever is started first is 10 % slower; the numerator truly is 2 % slower."""
    found = stats.balanced_ratio([0.98 * 0.9, 0.98 / 0.9] * 3)
    assert found.ratio == pytest.approx(0.98)
    assert found.ci95 == pytest.approx((0.98, 0.98))
    assert found.pairs == 3


def test_a_balanced_interval_is_of_pairs():
    found = stats.balanced_ratio([1.0, 1.0, 1.1, 1.1, 2.0])  # the last has no opposite
    half = 12.706 * (math.log(1.1) / math.sqrt(2)) / math.sqrt(2)
    assert found.ratio == pytest.approx(math.sqrt(1.1))
    assert found.ci95 == pytest.approx((math.sqrt(1.1) * math.exp(-half), math.sqrt(1.1) * math.exp(half)))
    assert stats.balanced_ratio([0.9, 1.1]).ci95 is None
    assert stats.balanced_ratio([0.9]) is None
    assert stats.balanced_ratio([1.0] * 60).pairs == 30


def test_the_interval_of_a_share_holds_at_the_ends():
    """Wilson's values for 7 of 9, as in Brown, Cai and DasGupta's formula, and for none and all."""
    assert stats.share_interval(7, 9) == pytest.approx((0.4526, 0.9368), abs=1e-4)
    assert stats.share_interval(0, 10)[0] == pytest.approx(0.0)
    assert stats.share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_ranks_correlate_and_ties_share_theirs():
    assert stats.rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1.0)
    assert stats.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert stats.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # scipy's spearmanr
    assert math.isnan(stats.rank_correlation([1, 1], [1, 2]))
