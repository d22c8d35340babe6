"""The arithmetic of the benchmark: percentiles, paired bootstrap, the paper's Eq. 5 and Eq. 6.

Pure functions of numbers. Times are in milliseconds, lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_BLOCK = 500  # resamples drawn at a time, so that memory stays flat for long runs


def describe(values: Sequence[float], metric: str = "ttft") -> dict[str, float]:
    """Mean, median, standard deviation and percentiles under vLLM's names (`p99_ttft_ms`).

    Percentiles interpolate linearly, the deviation is the population's, as in
    `vllm bench serve`. All are 0 where nothing was measured, as there.
    """
    data = np.asarray(values if len(values) else [0.0], dtype=np.float64)
    out = {"mean": data.mean(), "median": np.median(data), "std": data.std()}
    out |= {f"p{p}": np.percentile(data, p) for p in (50, 90, 99)}
    return {f"{name}_{metric}_ms": float(value) for name, value in out.items()}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two arms measured in the same rounds, with 95 % bootstrap intervals."""

    of_medians: float
    of_medians_ci95: tuple[float, float]
    median_of_ratios: float
    median_of_ratios_ci95: tuple[float, float]
    pairs: int


def paired_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    rounds: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Ratio:
    """Ratio of two arms, `numerator[i]` and `denominator[i]` asked one after the other.

    `rounds[i]` is the round of pair i; by default each pair is a round of its own.
    Rounds are resampled whole: a slow minute of the machine stays in both arms, and
    pairs of one round, which resemble each other, do not pass for independent ones.
    Raises ValueError for unequal or empty series.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"paired_ratio needs two equally long series, not {a.shape} and {b.shape}")
    rng = np.random.default_rng(seed)
    ratios = a / b
    members = _members(list(range(a.size)) if rounds is None else rounds)
    missing = members < 0
    tables = [np.where(missing, np.nan, series[members]) for series in (a, b, ratios)]  # [round, pair of the round]
    median = np.nanmedian if missing.any() else np.median
    medians, paired = [], []
    for start in range(0, resamples, _BLOCK):
        count = min(_BLOCK, resamples - start)
        picks = rng.integers(0, len(members), size=(count, len(members)))
        above, below, ratio = (median(table[picks].reshape(count, -1), axis=1) for table in tables)
        medians.append(above / below)
        paired.append(ratio)
    return Ratio(
        of_medians=float(np.median(a) / np.median(b)),
        of_medians_ci95=_interval(np.concatenate(medians)),
        median_of_ratios=float(np.median(ratios)),
        median_of_ratios_ci95=_interval(np.concatenate(paired)),
        pairs=int(a.size),
    )


# Student's t, 97.5 %, by degrees of freedom from 1 on.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class BalancedRatio:
    """A ratio in which the order of starts cancels: the geometric mean over pairs of starts, one of each order."""

    ratio: float
    ci95: tuple[float, float] | None
    """By Student's t over the pairs; None for a single one."""
    pairs: int


def balanced_ratio(by_start: Sequence[float]) -> BalancedRatio | None:
    """The ratio of two servers over starts that follow each other in opposite orders; None without a pair.

    The repeated measurement is the start, not the burst (Kalibera and Jones, Rigorous benchmarking in
    reasonable time, 2013): what a process got when it was started it keeps. A last start without its
    opposite is left out.
    """
    pairs = len(by_start) // 2
    if not pairs:
        return None
    logs = np.log(np.asarray(by_start[: 2 * pairs], dtype=np.float64)).reshape(pairs, 2).mean(axis=1)
    middle = float(logs.mean())
    if pairs == 1:
        return BalancedRatio(float(np.exp(middle)), None, 1)
    t = _T975[pairs - 2] if pairs - 2 < len(_T975) else _T975[-1]
    reach = t * float(logs.std(ddof=1)) / pairs**0.5
    return BalancedRatio(float(np.exp(middle)), (float(np.exp(middle - reach)), float(np.exp(middle + reach))), pairs)


def _members(rounds: Sequence[int]) -> NDArray[np.int64]:
    """Indices of the pairs of each round, [rounds, most pairs of a round], filled up with -1."""
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(rounds):
        groups.setdefault(number, []).append(i)
    width = max(len(group) for group in groups.values())
    return np.array([group + [-1] * (width - len(group)) for group in groups.values()], dtype=np.int64)


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def norm_flops(new_prompt: int, question: int, prompt: int) -> float:
    """Eq. 5: share of the prefill left, (L'_p + L_q) / (L_p + L_q), under linear cost."""
    return (new_prompt + question) / (prompt + question)


def overhead_fraction(alpha: float, beta: float, tokens: int) -> float:
    """Eq. 6's rho: the fixed share alpha / (alpha + beta * tokens) of a full prompt's TTFT."""
    return alpha / (alpha + beta * tokens)


def predicted_ratio(fraction: float, norm: float) -> float:
    """Eq. 6: TTFT(new) / TTFT(full) = rho + (1 - rho) * NormFLOPs."""
    return fraction + (1.0 - fraction) * norm


@dataclass(frozen=True)
class LinearFit:
    """TTFT = alpha + beta * prefilled tokens (Eq. 6's cost model), fitted to measured medians."""

    alpha_ms: float
    beta_ms_per_token: float
    largest_relative_residual: float
    """How far the worst point lies from the line: near 0 where prefill really is linear."""
    points: int

    def predict(self, tokens: float) -> float:
        return self.alpha_ms + self.beta_ms_per_token * tokens


def fit_linear(tokens: Sequence[float], ttft_ms: Sequence[float]) -> LinearFit | None:
    """Least squares of the relative error, min sum(((alpha + beta * T) / y - 1)^2).

    Timing noise grows with the time itself, so each point is weighted by 1/y; an
    unweighted fit would let the longest prompt alone decide alpha. None where all
    lengths are equal: a line needs two.
    """
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ttft_ms, dtype=np.float64)
    if np.unique(x).size < 2:
        return None
    design = np.stack([1.0 / y, x / y], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    residual = float(np.abs((alpha + beta * x) / y - 1.0).max())
    return LinearFit(float(alpha), float(beta), residual, int(x.size))
