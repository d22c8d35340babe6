"""Places against what they keep: rho and the share of the facts, for several kinds of places, as one picture.

    python experiments/front.py --out front.png 'learned=learned4.json' 'words, trained=default.json' \
        'words, not trained=words.json#lit60-rsv+probe'

Each argument is KIND=FILE. FILE is what `be-serve eval --json` or a run's evaluation.json holds, or a list of rows
(`vectors`, `rho`, `rho_interval`, `facts`, `facts_of`), of which #NAME or #PROMPT/NAME picks one. Points of one kind
are joined. Intervals are 95 %: rho's from the file, that of a share of facts after Wilson.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from be_serve.core.errors import InputError
from benchmarks.common.stats import share_interval


@dataclass(frozen=True)
class Point:
    """One token, or one text in its place."""

    kind: str
    places: int
    rho: float
    rho_interval: tuple[float, float]
    facts: int
    facts_of: int

    @property
    def facts_interval(self) -> tuple[float, float]:
        """95 % interval of the share of facts (Wilson)."""
        return share_interval(self.facts, self.facts_of)


def read_point(argument: str) -> Point:
    """A point from KIND=FILE or KIND=FILE#NAME. Raises InputError."""
    kind, _, where = argument.partition("=")
    path, _, name = where.partition("#")
    try:
        found: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(found, list):
            (row,) = [row for row in found if name in (row["name"], f"{row.get('prompt')}/{row['name']}")]
            low, high = row["rho_interval"]
            return Point(kind, row["vectors"], row["rho"], (low, high), row["facts"], row["facts_of"])
        low, high = found["rho_interval"]
        facts = found["facts"]
        return Point(kind, found["k"], found["rho"], (low, high), round(facts["be"] * facts["n"]), facts["n"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        why = f"{argument!r} names no figures of one token: {exc!r}. Give KIND=FILE or KIND=FILE#NAME."
        raise InputError(why) from exc


def draw(points: Sequence[Point], out: Path, title: str) -> None:
    """Two charts side by side, rho and facts against places on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda p: p.places):
        kinds[point.kind].append(point)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind, own in kinds.items():
        places = [p.places for p in own]
        rho, share = [p.rho for p in own], [p.facts / p.facts_of for p in own]
        for axis, values, intervals in (
            (left, rho, [p.rho_interval for p in own]),
            (right, share, [p.facts_interval for p in own]),
        ):
            below = [max(0.0, value - low) for value, (low, _) in zip(values, intervals, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, intervals, strict=True)]
            axis.errorbar(places, values, yerr=[below, above], marker="o", capsize=3, label=kind)
    left.set_ylabel("rho (0: the full prompt, 1: no prompt)")
    right.set_ylabel("share of the facts that is said")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("places")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(out, dpi=110)


@click.command()
@click.argument("points", nargs=-1, required=True)
@click.option("--title", default="", help="Model and prompt, above the picture.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="PNG to write.")
def main(points: tuple[str, ...], title: str, out: Path) -> None:
    """Draw KIND=FILE points."""
    draw([read_point(argument) for argument in points], out, title)
    click.echo(f"Wrote {out}.")


if __name__ == "__main__":
    main()
