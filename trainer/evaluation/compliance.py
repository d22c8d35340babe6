"""How often answers have checkable habits, and how much of the prompt's gain the token keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.checkers import Check

FULL, NONE = 0.6, 0.2
"""A habit is measurable where the full prompt has it at least so often, and no prompt at most so often."""
ARMS = ("none", "full", "be")


@dataclass(frozen=True)
class Compliance:
    """Shares of the answers with each habit, by arm, and the gain retained over the measurable habits.

    `gain` is (be - none) / (full - none), pooled, with its 95 % bootstrap interval over
    the queries; None where no habit is measurable.
    """

    shares: dict[str, dict[str, float]]
    answers: int
    measurable: list[str]
    gain: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Part of `eval --json`."""
        return {
            "shares": self.shares,
            "answers": self.answers,
            "measurable": self.measurable,
            "gain_retained": self.gain,
            "interval": None if self.interval is None else list(self.interval),
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{name}: no prompt {of['none']:.0%}, full prompt {of['full']:.0%}, token {of['be']:.0%}"
            for name, of in self.shares.items()
        ]
        if self.gain is None or self.interval is None:
            return [*found, f"gain retained: not measurable (no habit with full >= {FULL} and none <= {NONE})"]
        low, high = self.interval
        return [*found, f"gain retained over {len(self.measurable)}: {self.gain:.2f} ({low:.2f} to {high:.2f})"]


def measure_compliance(checks: Sequence[Check], answers: Mapping[str, Sequence[str]], draws: int = 2000) -> Compliance:
    """Hold every check against every answer; `answers` maps none, full and be to those of the same queries."""
    held = {arm: np.array([[check.holds(text) for check in checks] for text in answers[arm]], float) for arm in ARMS}
    shares = {str(check): {arm: float(held[arm][:, i].mean()) for arm in ARMS} for i, check in enumerate(checks)}
    usable = [i for i, of in enumerate(shares.values()) if of["full"] >= FULL and of["none"] <= NONE]
    names = [list(shares)[i] for i in usable]
    count = len(answers["full"])
    if not usable:
        return Compliance(shares, count, names, None, None)
    sums = {arm: held[arm][:, usable].sum(1) for arm in ARMS}
    drawn = np.random.default_rng(0).integers(0, count, (draws, count))

    def gain(of: Mapping[str, Any]) -> Any:
        return (of["be"] - of["none"]) / (of["full"] - of["none"])

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = gain({arm: sums[arm][drawn].sum(1) for arm in ARMS})
    low, high = np.quantile(ratios[np.isfinite(ratios)], [0.025, 0.975])
    return Compliance(
        shares, count, names, float(gain({arm: sums[arm].sum() for arm in ARMS})), (float(low), float(high))
    )
