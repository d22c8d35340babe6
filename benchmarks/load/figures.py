"""Compute the reported figures from bursts. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common.client import Sample
from benchmarks.common.stats import balanced_ratio, describe, paired_ratio
from benchmarks.load.options import LoadOptions

RATIOS = (("plain", "plain_other"), ("be", "plain"), ("be", "be_other"), ("again_other", "plain_other"))
METRICS = ("tokens_per_s", "itl_ms", "ttft_ms", "http_cpu_ms")
HISTOGRAMS = {"wall": "be_serve_injection_seconds", "cpu": "be_serve_injection_cpu_seconds"}
"""The server's histograms of the time that the plugin takes for a request with a token."""


@dataclass
class Burst:
    """The chats of one arm that were sent at the same time."""

    seconds: float
    samples: list[Sample]
    cpu_seconds: float | None = None
    """CPU time of the server's HTTP process in seconds; None if the system does not report it."""

    def figures(self) -> dict[str, float] | None:
        """Return output tokens per second, median inter-token latency and median TTFT; None if a chat failed.

        `http_cpu_ms` is the CPU time of the server's HTTP process per chat.
        """
        if any(not sample.ok for sample in self.samples):
            return None
        itls = [itl for sample in self.samples for itl in sample.itls]
        found = {
            "tokens_per_s": sum(sample.completion_tokens for sample in self.samples) / self.seconds,
            "itl_ms": 1e3 * statistics.median(itls) if itls else 0.0,
            "ttft_ms": 1e3 * statistics.median(sample.ttft for sample in self.samples),
        }
        if self.cpu_seconds is not None:
            found["http_cpu_ms"] = 1e3 * self.cpu_seconds / len(self.samples)
        return found


@dataclass
class Round:
    """One burst of every arm."""

    start: int
    """Index of the start of the servers."""
    bursts: dict[str, Burst] = field(default_factory=dict)


def load_figures(options: LoadOptions, rounds: Sequence[Round]) -> dict[str, Any]:
    """Return medians of each arm and ratios of arms, over the rounds without a failed chat.

    `balanced` is the ratio to report. Bursts of the same two processes are not independent, so its unit is the
    start, and the effect of the start order cancels. The intervals of `paired_ratio` resample whole starts.
    """
    complete: list[tuple[int, dict[str, dict[str, float]]]] = []
    for one in rounds:
        found = {arm: figures for arm, burst in one.bursts.items() if (figures := burst.figures())}
        if len(found) == len(options.arms):
            complete.append((one.start, found))
    samples = [sample for one in rounds for burst in one.bursts.values() for sample in burst.samples]
    failed = [sample.error for sample in samples if not sample.ok]
    starts = [start for start, _ in complete]
    metrics = [metric for metric in METRICS if complete and metric in complete[0][1]["plain"]]

    def series(arm: str, metric: str, start: int | None = None) -> list[float]:
        return [found[arm][metric] for number, found in complete if start in (None, number)]

    def compare(above: str, below: str, metric: str) -> dict[str, Any]:
        groups = starts if len(set(starts)) > 1 else None
        ratio = paired_ratio(series(above, metric), series(below, metric), seed=options.seed, rounds=groups)
        each = [
            statistics.median(series(above, metric, start)) / statistics.median(series(below, metric, start))
            for start in sorted(set(starts))
        ]
        balanced = balanced_ratio(each)
        return {**asdict(ratio), "of_medians_by_start": each, "balanced": asdict(balanced) if balanced else None}

    return {
        "bursts": [{"start": start, **found} for start, found in complete],
        "rounds": len(complete),
        "starts": len(set(starts)),
        "failed_chats": len(failed),
        "errors": sorted(set(failed))[:5],
        "arms": {
            arm: {
                "tokens_per_s": statistics.median(series(arm, "tokens_per_s")),
                **{
                    name: value
                    for metric in metrics
                    if metric.endswith("_ms")
                    for name, value in describe(series(arm, metric), metric.removesuffix("_ms")).items()
                },
            }
            for arm in options.arms
            if complete
        },
        "ratios": {
            f"{above}/{below}": {metric: compare(above, below, metric) for metric in metrics}
            for above, below in RATIOS
            if complete and {above, below} <= set(options.arms)
        },
    }


def read_histogram(metrics_text: str, name: str) -> Counter[str]:
    """Return the cumulative count of each bucket (key: upper bound in seconds, or `+Inf`) from a `/metrics` text."""
    found: Counter[str] = Counter()
    for line in metrics_text.splitlines():
        if line.startswith(f"{name}_bucket"):
            bound = line.partition('le="')[2].partition('"')[0]
            found[bound] += int(float(line.rpartition(" ")[2]))
    return found


def shares(counts: Counter[str]) -> dict[str, float] | None:
    """Return upper bound in seconds -> cumulative share of observations; None without observations."""
    return {bound: count / counts["+Inf"] for bound, count in counts.items()} if counts["+Inf"] else None


def within(found: dict[str, float], share: float) -> str:
    """Return the lowest upper bound in seconds whose cumulative share is at least `share`."""
    return next(bound for bound, held in found.items() if held >= share)


def headline(ratio: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """Return the value and 95 % interval of a ratio to report: the balanced ratio if there is one."""
    balanced = ratio.get("balanced")
    if balanced:
        return balanced["ratio"], balanced["ci95"]
    return ratio["of_medians"], ratio["of_medians_ci95"]
