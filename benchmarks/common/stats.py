"""Statistics of benchmarks and experiments: percentiles, bootstrap, shares, ranks, the paper's Eq. 5 and Eq. 6.

All functions are pure. Times are in milliseconds, lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_BLOCK = 500  # resamples per batch; bounds the memory for long runs


def describe(values: Sequence[float], metric: str = "ttft") -> dict[str, float]:
    """Return mean, median, standard deviation and percentiles under vLLM's names (`p99_ttft_ms`).

    As in `vllm bench serve`, percentiles interpolate linearly, the standard deviation is the
    population's, and all figures are 0 without values.
    """
    data = np.asarray(values if len(values) else [0.0], dtype=np.float64)
    out = {"mean": data.mean(), "median": np.median(data), "std": data.std()}
    out |= {f"p{p}": np.percentile(data, p) for p in (50, 90, 99)}
    return {f"{name}_{metric}_ms": float(value) for name, value in out.items()}


@dataclass(frozen=True)
class Ratio:
    """Ratio of two arms measured in the same rounds, with 95 % bootstrap intervals."""

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
    """Return the ratio of two arms. `numerator[i]` and `denominator[i]` are a pair, measured in succession.

    `rounds[i]` is the round of pair i; by default each pair is one round. The bootstrap draws
    whole rounds. A slow minute of the machine then affects both arms, and the dependent pairs of
    one round do not count as independent. Raises ValueError for unequal or empty series.
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


# Student's t, 97.5 %; index 0 is one degree of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True)
class BalancedRatio:
    """Ratio without the effect of the start order: geometric mean over pairs of starts, one start in each order."""

    ratio: float
    ci95: tuple[float, float] | None
    """95 % interval by Student's t over the pairs; None for a single pair."""
    pairs: int


def balanced_ratio(by_start: Sequence[float]) -> BalancedRatio | None:
    """Return the ratio of two servers over starts in alternating order; None without a pair.

    The unit of repetition is the start, not the burst, because a process keeps the conditions of
    its start (Kalibera and Jones, Rigorous benchmarking in reasonable time, 2013). A last start
    without a partner is not used.
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
    """Return the indices of each round's pairs, [rounds, maximum pairs per round], padded with -1."""
    groups: dict[int, list[int]] = {}
    for i, number in enumerate(rounds):
        groups.setdefault(number, []).append(i)
    width = max(len(group) for group in groups.values())
    return np.array([group + [-1] * (width - len(group)) for group in groups.values()], dtype=np.int64)


def _interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


_Z975 = 1.959964


def share_interval(count: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `n` > 0 after Wilson (1927), which holds near 0 and 1, too."""
    share, z2 = count / n, _Z975**2
    middle = share + z2 / (2 * n)
    half = _Z975 * (share * (1 - share) / n + z2 / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation. Equal values share the mean of their ranks; NaN where all are equal."""

    def ranks(values: Sequence[float]) -> NDArray[np.float64]:
        _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[place]

    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def norm_flops(new_prompt: int, question: int, prompt: int) -> float:
    """Return Eq. 5: the remaining share of the prefill, (L'_p + L_q) / (L_p + L_q), at linear cost."""
    return (new_prompt + question) / (prompt + question)


def overhead_fraction(alpha: float, beta: float, tokens: int) -> float:
    """Return rho of Eq. 6: the fixed share alpha / (alpha + beta * tokens) of a full prompt's TTFT."""
    return alpha / (alpha + beta * tokens)


def predicted_ratio(fraction: float, norm: float) -> float:
    """Return Eq. 6: TTFT(new) / TTFT(full) = rho + (1 - rho) * NormFLOPs."""
    return fraction + (1.0 - fraction) * norm


@dataclass(frozen=True)
class LinearFit:
    """Cost model of Eq. 6, TTFT = alpha + beta * prefilled tokens, fitted to measured medians."""

    alpha_ms: float
    beta_ms_per_token: float
    largest_relative_residual: float
    """Relative distance of the worst point from the line. It is near 0 if prefill is linear."""
    points: int

    def predict(self, tokens: float) -> float:
        """Return the TTFT in ms for a number of prefilled tokens."""
        return self.alpha_ms + self.beta_ms_per_token * tokens


def fit_linear(tokens: Sequence[float], ttft_ms: Sequence[float]) -> LinearFit | None:
    """Return the fit with the least squared relative error, min sum(((alpha + beta * T) / y - 1)^2).

    Timing noise grows with the time, so each point has the weight 1/y. In an unweighted fit the
    longest prompt would determine alpha alone. None if all lengths are equal.
    """
    x, y = np.asarray(tokens, dtype=np.float64), np.asarray(ttft_ms, dtype=np.float64)
    if np.unique(x).size < 2:
        return None
    design = np.stack([1.0 / y, x / y], axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    residual = float(np.abs((alpha + beta * x) / y - 1.0).max())
    return LinearFit(float(alpha), float(beta), residual, int(x.size))
