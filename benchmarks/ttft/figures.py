"""Compute the reported figures from raw samples, as plain data for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from benchmarks.common import stats
from benchmarks.common.client import Sample
from benchmarks.ttft.workload import RATIOS, Arm, Case

# The project's bounds: (description, prompt tokens or None for every case, ratio, interval end or None, limit).
_BOUNDS: tuple[tuple[str, int | None, str, str | None, float], ...] = (
    ("[BE] / full prompt cold", 1584, "be/full_cold", None, 0.15),
    ("[BE] / full prompt cached", 1584, "be/full_warm", None, 0.75),
    ("[BE] / k-token prompt, upper end of the interval", None, "be/floor", "upper", 1.10),
)


@dataclass
class Run:
    """Samples of one run, with its options, servers and machine."""

    model: str
    k: int
    seed: int
    rounds: int
    """Requested rounds. An interrupted run has fewer."""
    close: int
    """Extra passes in each round over the arms in `CLOSE` only."""
    max_tokens: int
    arms: tuple[Arm, ...]
    started: datetime
    command: list[str]
    cases: list[Case] = field(default_factory=list)
    samples: dict[tuple[str, str], dict[int, Sample]] = field(default_factory=dict)
    """(case, arm) -> pass -> sample, without the warm-up. Pass n belongs to round n // (1 + close)."""
    interrupted: bool = False
    stopped: str = ""
    """The reason, if a failing server ended the run early; otherwise empty."""
    notes: list[str] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    token: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, case: Case, arm: Arm) -> dict[int, Sample]:
        """Return the samples of an arm in a case by pass."""
        return self.samples.get((case.name, arm.name), {})

    @property
    def rounds_measured(self) -> int:
        """Number of rounds with a full pass: a request of every arm in every case."""
        asked = [set(self.of(case, arm)) for case in self.cases for arm in self.arms]
        return len(set.intersection(*asked)) if asked else 0


def analyse(run: Run) -> dict[str, Any]:
    """Return all reported figures: by case and arm, ratios with intervals, Eq. 5 and 6, verdicts."""
    fit = _fit(run)
    cases = [_case(run, case, fit) for case in run.cases]
    return {
        "cases": cases,
        "fit": asdict(fit) if fit else None,
        "verdicts": _verdicts(cases),
        "notes": _cache_notes(cases),
        "round_trip_ms": _round_trip_ms(run),
        "failed": sum(arm["failed"] for case in cases for arm in case["arms"].values()),
    }


def _good(samples: dict[int, Sample]) -> dict[int, Sample]:
    return {number: sample for number, sample in samples.items() if sample.ok}


def _case(run: Run, case: Case, fit: stats.LinearFit | None) -> dict[str, Any]:
    arms = {arm.name: _arm(run, case, arm) for arm in run.arms}
    return {
        "case": case.name,
        "prompt_tokens": case.prompt_tokens,
        "question_tokens": case.question_tokens,
        "template_tokens": case.template_tokens,
        "k": case.k,
        "arms": arms,
        "ratios": _ratios(run, case),
        "model": _cost_model(case, arms, fit),
    }


def _arm(run: Run, case: Case, arm: Arm) -> dict[str, Any]:
    """Return the figures of one arm in one case, with the field names of `vllm bench serve`.

    `duration` is the sum of the arm's request times, because requests of the arms alternate.
    Raw series are in seconds, as in `vllm bench serve`.
    """
    everything = run.of(case, arm)
    good = list(_good(everything).values())
    duration = sum(s.e2e for s in good)
    inputs, outputs = sum(s.prompt_tokens for s in good), sum(s.completion_tokens for s in good)
    tpots = [(s.e2e - s.ttft) / (s.completion_tokens - 1) for s in good if s.completion_tokens > 1]
    known = [s.cached_tokens for s in good if s.cached_tokens is not None]
    per_second = (1 / duration) if duration else 0.0
    return {
        "date": run.started.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "backend": "openai-chat",
        "label": arm.name,
        "model_id": run.model,
        "tokenizer_id": run.model,
        "num_prompts": len(everything),
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": 1,
        "duration": duration,
        "completed": len(good),
        "failed": len(everything) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) * per_second,
        "output_throughput": outputs * per_second,
        "total_token_throughput": (inputs + outputs) * per_second,
        **stats.describe([s.ttft * 1e3 for s in good], "ttft"),
        **stats.describe([t * 1e3 for t in tpots], "tpot"),
        **stats.describe([t * 1e3 for s in good for t in s.itls], "itl"),
        **stats.describe([s.e2e * 1e3 for s in good], "e2el"),
        "server": arm.server,
        "warm": arm.warm,
        # Median; None if the server does not report it (vLLM: --enable-prompt-tokens-details).
        "cached_tokens": int(sorted(known)[len(known) // 2]) if known else None,
        "passes": list(everything),
        "input_lens": [s.prompt_tokens for s in everything.values()],
        "output_lens": [s.completion_tokens for s in everything.values()],
        "ttfts": [s.ttft for s in everything.values()],
        "itls": [s.itls for s in everything.values()],
        "latencies": [s.e2e for s in everything.values()],
        "start_times": [s.started for s in everything.values()],
        "generated_texts": [s.text for s in everything.values()],
        "errors": [s.error for s in everything.values()],
    }


def _ratios(run: Run, case: Case) -> dict[str, dict[str, Any]]:
    """Return paired ratios of TTFT over the passes in which both arms succeeded."""
    arms = {arm.name: _good(run.of(case, arm)) for arm in run.arms}
    out = {}
    for above, below in RATIOS:
        shared = sorted(arms.get(above, {}).keys() & arms.get(below, {}).keys())
        if shared:
            a, b = ([arms[name][n].ttft for n in shared] for name in (above, below))
            saved = float(np.median(b) - np.median(a)) * 1e3
            ratio = stats.paired_ratio(a, b, rounds=[n // (1 + run.close) for n in shared], seed=run.seed)
            out[f"{above}/{below}"] = {**asdict(ratio), "saved_ms": saved}
    return out


def _fit(run: Run) -> stats.LinearFit | None:
    """Fit alpha and beta of Eq. 6 to the medians of the plain, uncached arms of the stock server over all cases."""
    stock = [a for a in run.arms if a.content != "token" and not a.warm]
    if any(a.server == "stock" for a in stock):
        stock = [a for a in stock if a.server == "stock"]
    tokens, medians = [], []
    for case in run.cases:
        for arm in stock:
            if good := _good(run.of(case, arm)):
                tokens.append(float(case.input_tokens(arm)))
                medians.append(stats.describe([s.ttft * 1e3 for s in good.values()])["median_ttft_ms"])
    return stats.fit_linear(tokens, medians) if tokens else None


def _cost_model(case: Case, arms: dict[str, Any], fit: stats.LinearFit | None) -> dict[str, Any]:
    """Return the paper's bound for this case and the prediction of the fitted cost model.

    Every arm prefills the chat template's tokens, so they count as fixed cost: alpha here is the
    fitted alpha + beta * template_tokens.
    """
    norm = stats.norm_flops(case.k, case.question_tokens, case.prompt_tokens)
    out: dict[str, Any] = {"norm_flops": norm, "speedup_bound": 1 / norm}
    if fit is None:
        return out
    alpha = fit.alpha_ms + fit.beta_ms_per_token * case.template_tokens
    length = case.prompt_tokens + case.question_tokens
    fraction = stats.overhead_fraction(alpha, fit.beta_ms_per_token, length)
    out |= {
        "overhead_fraction": fraction,
        "predicted_ratio": stats.predicted_ratio(fraction, norm),
        "predicted_be_ttft_ms": fit.predict(case.template_tokens + case.k + case.question_tokens),
    }
    if arms["be"]["completed"]:
        out["measured_be_ttft_ms"] = arms["be"]["median_ttft_ms"]
    return out


def _cache_notes(cases: list[dict[str, Any]]) -> list[str]:
    """Return notes on arms whose number of cached tokens contradicts \"warm\" or \"cold\"."""
    notes = []
    for case in cases:
        for name, arm in case["arms"].items():
            cached = arm["cached_tokens"]
            if cached is None:
                continue
            if arm["warm"] and cached < case["prompt_tokens"] / 2:
                notes.append(
                    f"{name} of case {case['case']} found only {cached} tokens in the cache. The prompt is shorter "
                    "than a block (128 tokens on a CPU), or the cache is too small (set --kv-gib)."
                )
            if not arm["warm"] and cached:
                notes.append(
                    f"{name} of case {case['case']} found {cached} tokens in the cache, so the arm was not cold."
                )
    return notes


def _round_trip_ms(run: Run) -> float | None:
    """Return the median time of an empty request (`GET /health`) in ms: the share of network and client."""
    trips = [s.round_trip for rounds in run.samples.values() for s in _good(rounds).values()]
    return float(np.median(trips)) * 1e3 if trips else None


def _verdicts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each bound with its measured value. `pass` is None if the case was not measured."""
    out = []
    for what, prompt, ratio, end, limit in _BOUNDS:
        chosen: list[Any] = [c for c in cases if prompt is None or c["prompt_tokens"] == prompt]
        for case in chosen or [None]:
            found = case["ratios"].get(ratio) if case else None
            value = None
            if found:
                value = found["of_medians_ci95"][1] if end == "upper" else found["of_medians"]
            out.append(
                {
                    "bound": what,
                    "case": case["case"] if case else f"{prompt}:*",
                    "limit": limit,
                    "value": value,
                    "pass": None if value is None else value <= limit,
                }
            )
    return out
