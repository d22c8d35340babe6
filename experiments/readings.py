"""Does the verdict say what a reader says? Blind sheets of answers, and how far both agree.

    be-serve eval TOKEN ... --answer-queries 48 --samples 48 --json > REPORT     # for each token
    python experiments/readings.py sheets readings PROMPT=REPORT...
    # a person, or a model that has seen none of this, reads each sheet by readings/brief.md and writes a line
    # {"sheet": "01", "status": "lossy", "why": "..."} into a file
    python experiments/readings.py score readings READER.jsonl...

A sheet holds the prompt and pairs of answers in an order drawn for each question: neither which is the token's nor
any figure. `key.json` says what a sheet holds, and must not be shown to a reader.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from be_serve.core.errors import InputError
from be_serve.core.prompts import read_prompt_file

STATUS = ("deployable", "lossy", "failed")
BRIEF = """# What to read, and what to write

You run an assistant whose instructions stand at the top of each sheet. It is about to be replaced by a cheaper one.
A sheet shows what users asked, and for each question the answers of both, in an order that changes from question to
question: you are not told which is which. Small models write both. Do not judge how good an answer is; judge whether
users get the same assistant from both.

Read the instructions, then every pair. Then write one word for the sheet:

- `deployable`: nobody would mind the change. Names, facts, manner and rules are the same in nearly all pairs. Other
  words for the same, or a detail more or less here and there, do not count.
- `lossy`: plainly the same assistant, but users would lose something: facts that one answer has right by the
  instructions and the other lacks or has wrong, in more than a few of the pairs that turn on them; rules kept by one
  only; answers of one that never end or go round in circles.
- `failed`: not the same assistant. One answer of most pairs could have been written without the instructions, or
  makes no sense.

One line of JSON a sheet: `{"sheet": "01", "status": "lossy", "why": "one sentence that names the worst loss"}`.
"""


@click.group()
def main() -> None:
    """Hold the verdict against readers."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("reports", nargs=-1, required=True)
@click.option("--pairs", default=32, show_default=True, help="Pairs of answers on a sheet.")
@click.option("--seed", default=0, show_default=True, help="Draws the pairs, their order and that of the sheets.")
def sheets(folder: Path, reports: tuple[str, ...], pairs: int, seed: int) -> None:
    """Write a sheet for each PROMPT=REPORT, where PROMPT is a file and REPORT what `be-serve eval --json` printed."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)  # noqa: S311  draws an order, guards nothing
    key = []
    for number, argument in enumerate(draw.sample(reports, len(reports)), 1):
        prompt, _, report = argument.partition("=")
        found = read_report(Path(report))
        if len(found["samples"]) < pairs:
            raise InputError(f"{report} holds {len(found['samples'])} answers, fewer than {pairs}.")
        chosen = draw.sample(found["samples"], pairs)
        order = [draw.choice(("be", "full")) for _ in chosen]
        name = f"{number:02}"
        (folder / f"sheet-{name}.md").write_text(sheet(read_prompt_file(prompt), chosen, order), encoding="utf-8")
        told = {field: found[field] for field in ("k", "rho", "verdict")}
        key.append({"sheet": name, "report": Path(report).name, **told, "first": order})
    (folder / "brief.md").write_text(BRIEF, encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(key)} sheets in {folder}: " + counted(Counter(row["verdict"]["status"] for row in key)))


def read_report(path: Path) -> dict[str, Any]:
    """What `be-serve eval --json` printed: its last line, or the whole file. Raises InputError."""
    try:
        text = path.read_text(encoding="utf-8").strip()
        report: dict[str, Any] = json.loads(text if text.startswith("{") else text.splitlines()[-1])
        report["samples"], report["verdict"]["status"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path} is no report of be-serve eval --json: {error}") from error
    return report


def sheet(prompt: str, samples: Sequence[Mapping[str, str]], first: Sequence[str]) -> str:
    """The text of one sheet; `first` says whose answer stands first, `be` or `full`."""
    parts = ["# Instructions", "", quoted(prompt), ""]
    for number, (sample, one) in enumerate(zip(samples, first, strict=True), 1):
        other = "full" if one == "be" else "be"
        parts += [f"## {number}. {' '.join(sample['query'].split())}", ""]
        parts += ["A:", quoted(sample[one]), "", "B:", quoted(sample[other]), ""]
    return "\n".join(parts)


def quoted(text: str) -> str:
    """Text behind `>`, so that nothing in it reads as part of the sheet."""
    return "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("readers", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def score(folder: Path, readers: tuple[Path, ...]) -> None:
    """How often each reader and the verdict, and the readers with each other, say the same of a sheet."""
    key = {row["sheet"]: row["verdict"]["status"] for row in json.loads((folder / "key.json").read_text("utf-8"))}
    said = {file.stem: read_readings(file, key) for file in readers}
    for name, own in said.items():
        compare(name, own, "verdict", key)
    for i, (name, own) in enumerate(said.items()):
        for other, theirs in list(said.items())[i + 1 :]:
            compare(name, own, other, theirs)
    click.echo("\nsheet  " + "  ".join(f"{name:10}" for name in ("verdict", *said)))
    for number, status in sorted(key.items()):
        click.echo(f"{number:5}  " + "  ".join(f"{s:10}" for s in (status, *(own[number] for own in said.values()))))


def read_readings(path: Path, key: Mapping[str, str]) -> dict[str, str]:
    """Status by sheet. Raises InputError where a sheet is missing, unknown or read twice."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {row["sheet"]: row["status"] for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path} needs lines such as {{"sheet": "01", "status": "lossy"}}: {error}') from error
    if set(found) != set(key) or len(rows) != len(key) or not set(found.values()) <= set(STATUS):
        raise InputError(f"{path} needs one line a sheet, {', '.join(sorted(key))}, each {', '.join(STATUS)}.")
    return found


def compare(name: str, own: Mapping[str, str], other: str, theirs: Mapping[str, str]) -> None:
    """Agreement of two, and which way they part."""
    same = sum(own[number] == theirs[number] for number in own)
    apart = Counter(
        f"{name} {own[number]}, {other} {theirs[number]}" for number in own if own[number] != theirs[number]
    )
    click.echo(f"{name} and {other}: the same on {same} of {len(own)}" + (f" ({counted(apart)})" if apart else ""))


def counted(counter: Counter[str]) -> str:
    """What a counter holds, the most frequent first."""
    return "; ".join(f"{count} x {what}" for what, count in counter.most_common())


if __name__ == "__main__":
    main()
