"""Does the verdict say what a reader says? Sheets of a token's answers beside the full prompt's, and the agreement.

    be-serve eval TOKEN ... --samples 999 --json > REPORT                 # for each token
    python experiments/readings.py sheets SHEETS --key KEY.json PROMPT=REPORT...
    # a person, or a model that has seen none of this, reads SHEETS by SHEETS/brief.md and writes a line
    # {"sheet": "01", "marks": "ssls...", "status": "lossy", "why": "..."} a sheet into a file
    python experiments/readings.py score KEY.json READER.jsonl...

A sheet holds the prompt and pairs of answers, in an order that is drawn for each question, without a figure or a name.
Sheets of one prompt share no question: an answer that stood on two of them would be the full prompt's. A reader may
still guess which of two is, for the prompt stands on the sheet. KEY.json says what a sheet holds; it is for no reader.
"""

from __future__ import annotations

import json
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from be_serve.core.errors import InputError
from be_serve.core.prompts import read_prompt_file
from benchmarks.common.stats import rank_correlation, share_interval

STATUS = ("deployable", "lossy", "failed")
MARKS = "slo"
BRIEF = """# What to read, and what to write

A sheet begins with the instructions of an assistant. Below stand questions of users, and for each the answers of two
versions of that assistant, A and B. Which version stands first changes from question to question. Both may be wrong,
clumsy or rude: that is not asked. What is asked is whether a user would get something else from the one than from the
other.

Give each pair a letter, in the order of the sheet:

- `s`: the same to a user. Other words, or a detail more or less that nobody asked for, do not count.
- `l`: one of them loses something: a fact, a rule, a manner, or the answer's end.
- `o`: one of them could come from another assistant, which never had these instructions, or makes no sense.

Where both answers could come from any assistant, the pair is `s`.

Then give the sheet one word: could the one version take the other's place, whichever it is?

- `deployable`: yes. A user would hardly ever notice.
- `lossy`: it is plainly the same assistant, but users would lose things that the instructions promise them.
- `failed`: no. It is mostly another assistant, or often makes no sense.

One line of JSON a sheet: `{"sheet": "01", "marks": "ssls", "status": "lossy", "why": "the worst loss, in a sentence"}`.
"""


@click.group()
def main() -> None:
    """Hold the verdict against readers."""


@dataclass(frozen=True)
class Pairs:
    """What one sheet shows: answers of two arms of a report, and the verdict on the first of them."""

    prompt: str
    report: str
    arm: str
    """`be`, or `none` for a control."""
    status: str
    rho: float
    samples: Sequence[Mapping[str, str]]


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("reports", nargs=-1, required=True)
@click.option("--key", type=click.Path(path_type=Path), required=True, help="File that says what a sheet holds.")
@click.option("--pairs", default=20, show_default=True, help="Pairs of answers on a sheet.")
@click.option("--controls", default=0, show_default=True, help="Sheets of no prompt's answers, which have to fail.")
@click.option("--seed", type=int, help="Draws questions, order and numbers. [default: drawn, and told in the key]")
def sheets(folder: Path, reports: tuple[str, ...], key: Path, pairs: int, controls: int, seed: int | None) -> None:
    """Write a sheet for each PROMPT=REPORT, where PROMPT is a file and REPORT what `be-serve eval --json` printed."""
    if folder.exists() and any(folder.glob("sheet-*.md")):
        raise InputError(f"{folder} holds sheets already.")
    seed = secrets.randbits(32) if seed is None else seed
    draw = random.Random(seed)  # noqa: S311  draws an order, guards nothing
    found = [read_report(*argument.split("=", 1)) for argument in reports if "=" in argument]
    if len(found) < len(reports):
        raise InputError("Each report needs its prompt: PROMPT=REPORT.")
    found += [Pairs(p.prompt, p.report, "none", "failed", 1.0, p.samples) for p in draw.sample(found, controls)]
    draw.shuffle(found)
    folder.mkdir(parents=True, exist_ok=True)
    used: dict[str, set[str]] = defaultdict(set)
    rows = []
    for number, own in enumerate(found, 1):
        fresh = [sample for sample in own.samples if sample["query"] not in used[own.prompt]]
        if len(fresh) < pairs:
            raise InputError(f"{own.report} has {len(fresh)} questions left that stand on no other sheet, not {pairs}.")
        chosen = draw.sample(fresh, pairs)
        used[own.prompt] |= {sample["query"] for sample in chosen}
        first = [draw.choice((own.arm, "full")) for _ in chosen]
        name = f"{number:02}"
        (folder / f"sheet-{name}.md").write_text(sheet(own, chosen, first), encoding="utf-8")
        rows.append(
            {
                "sheet": name,
                "report": own.report,
                "arm": own.arm,
                "status": own.status,
                "rho": own.rho,
                "pairs": pairs,
                "identical": sum(sample[own.arm] == sample["full"] for sample in chosen),
                "first": first,
            }
        )
    (folder / "brief.md").write_text(BRIEF, encoding="utf-8")
    key.write_text(json.dumps({"seed": seed, "sheets": rows}, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{len(rows)} sheets in {folder}: {counted(Counter(str(row['status']) for row in rows))}")


def read_report(prompt: str, path: str) -> Pairs:
    """What `be-serve eval --json` printed: a file's last line, the whole file, or its `test`. Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
        report: dict[str, Any] = json.loads(text if text.startswith("{") else text.splitlines()[-1])
        report = report.get("test", report)
        samples = [{arm: str(sample[arm]) for arm in ("query", "full", "none", "be")} for sample in report["samples"]]
        status = report["verdict"]["status"]
        return Pairs(prompt, Path(path).name, "be", status, float(report["rho"]), samples)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no report of be-serve eval --json: {error!r}") from error


def sheet(own: Pairs, samples: Sequence[Mapping[str, str]], first: Sequence[str]) -> str:
    """The text of one sheet; `first` says whose answer stands first."""
    parts = ["# Instructions", "", quoted(read_prompt_file(own.prompt)), ""]
    for number, (sample, one) in enumerate(zip(samples, first, strict=True), 1):
        other = "full" if one == own.arm else own.arm
        parts += [f"## {number}", "", "User:", quoted(sample["query"]), ""]
        parts += ["A:", quoted(sample[one]), "", "B:", quoted(sample[other]), ""]
    return "\n".join(parts)


def quoted(text: str) -> str:
    """Text behind `>`, so that nothing in it reads as part of the sheet."""
    return "\n".join(f"> {line}" for line in text.strip().splitlines() or [""])


@main.command()
@click.argument("key", type=click.Path(exists=True, path_type=Path))
@click.argument("readers", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def score(key: Path, readers: tuple[Path, ...]) -> None:
    """How far each reader and the verdict, and the readers with each other, say the same of the sheets."""
    try:
        rows = {row["sheet"]: row for row in json.loads(key.read_text(encoding="utf-8"))["sheets"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{key} is no key that `sheets` wrote: {error!r}") from error
    said = {file.stem: read_readings(file, rows) for file in readers}
    if len(said) < len(readers) or "verdict" in said:
        raise InputError("Give each reader's file a name of its own, and none the name verdict.")
    status = {"verdict": {number: str(row["status"]) for number, row in rows.items()}}
    status |= {name: {number: own["status"] for number, own in found.items()} for name, found in said.items()}
    names = list(status)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            compare(other, status[other], name, status[name])
    for name, found in said.items():
        lost = [1 - found[number]["marks"].count("s") / len(found[number]["marks"]) for number in rows]
        rank = rank_correlation(lost, [float(row["rho"]) for row in rows.values()])
        click.echo(f"{name}: the share of pairs that are not the same and rho, rank correlation {rank:.2f}")
    click.echo("\nsheet  arm   rho    same  " + "  ".join(f"{name:10}" for name in names))
    for number, row in rows.items():
        same = "/".join(str(found[number]["marks"].count("s")) for found in said.values())
        told = "  ".join(f"{status[name][number]:10}" for name in names)
        click.echo(f"{number:5}  {row['arm']:4}  {row['rho']:.3f}  {same:4}  {told}")


def read_readings(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """What a reader wrote of each sheet. Raises InputError where a sheet is missing, unknown, read twice or unclear."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {str(line["sheet"]): {"marks": str(line["marks"]), "status": str(line["status"])} for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f'{path} needs lines {{"sheet": "01", "marks": "...", "status": "lossy"}}: {error!r}'
        ) from error
    if set(found) != set(rows) or len(lines) != len(rows):
        raise InputError(f"{path} needs one line for each of the sheets {', '.join(rows)}.")
    for number, own in found.items():
        if own["status"] not in STATUS or len(own["marks"]) != rows[number]["pairs"] or set(own["marks"]) - set(MARKS):
            raise InputError(
                f"{path}, sheet {number}: the status is one of {', '.join(STATUS)}, and there is one of the letters "
                f"{', '.join(MARKS)} for each of {rows[number]['pairs']} pairs."
            )
    return {number: found[number] for number in rows}


def compare(name: str, own: Mapping[str, str], other: str, theirs: Mapping[str, str]) -> None:
    """Agreement of two beside what chance, and always saying the most frequent word, would give."""
    n = len(own)
    same = sum(own[number] == theirs[number] for number in own)
    most = Counter(theirs.values()).most_common(1)[0][1]
    chance = sum(Counter(own.values())[s] * Counter(theirs.values())[s] for s in STATUS) / n**2
    kappa = "no kappa, for only one word was said" if chance == 1 else f"kappa {(same / n - chance) / (1 - chance):.2f}"
    low, high = share_interval(same, n)
    click.echo(
        f"{name} and {other}: the same on {same} of {n} ({low:.2f} to {high:.2f}), {kappa}; "
        f"always {other}'s most frequent word: {most}"
    )
    apart = Counter(f"{name} {own[i]}, {other} {theirs[i]}" for i in own if own[i] != theirs[i])
    if apart:
        click.echo(f"  {counted(apart)}")


def counted(counter: Counter[str]) -> str:
    """What a counter holds, the most frequent first."""
    return "; ".join(f"{count} x {what}" for what, count in counter.most_common())


if __name__ == "__main__":
    main()
