"""Many prompts in one process: a file of prompts, trained side by side on one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from be_serve.core.artifact import write_atomically
from be_serve.core.errors import BEError, InputError
from be_serve.core.ids import validate_be_id
from trainer.config import TrainConfig, absolute_ae, absolute_init, make_config
from trainer.data.teacher import Decoder
from trainer.model.frozen import FrozenModel
from trainer.optim.loop import fit
from trainer.run import Run, RunResult
from trainer.telling import Say

_PATHS = ("prompt_file", "queries", "test_queries")
_CACHE = "teacher"
_SERVERS = {"teacher_url", "teacher_model", "writer_url", "writer_model"}
_COMMON = {"model", "device", "dtype", "output", "teacher", *_SERVERS}


@dataclass(frozen=True)
class Entry:
    """One row of a batch file."""

    id: str
    values: dict[str, Any]
    prompt: str | None


@dataclass
class Outcome:
    """What became of one prompt: a result, or the reason why there is none."""

    id: str
    result: RunResult | None = None
    fault: str | None = None
    skipped: bool = False

    def to_json(self) -> dict[str, Any]:
        """An object of `train --batch-file --json`."""
        if self.result is None:
            return {"id": self.id, "skipped": True} if self.skipped else {"id": self.id, "error": self.fault}
        return self.result.to_json()


def read_batch(path: str | Path) -> list[Entry]:
    """Read a JSONL file of prompts, one object a line:

        {"id": "captain", "prompt": "You are ..."}
        {"id": "policy", "prompt_file": "policy.md", "queries": "q.jsonl", "tokens": 16}

    Any setting of a run may stand in a row; paths are relative to the
    file. The model is the same for all. Raises InputError naming the line at fault.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"Cannot read the batch file {path}: {exc}.") from exc
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _entry(json.loads(line), path.parent)
        except (ValueError, BEError) as exc:
            raise InputError(f"{path}, line {number}: {exc}") from exc
        if entry.id in entries:
            raise InputError(f"{path}, line {number}: the id {entry.id!r} was used before.")
        entries[entry.id] = entry
    if not entries:
        raise InputError(f"{path} holds no prompts.")
    return list(entries.values())


def _entry(row: object, folder: Path) -> Entry:
    if not isinstance(row, dict):
        raise ValueError("a row must be a JSON object.")
    be_id = validate_be_id(row.get("id"), param="id")
    if be_id == _CACHE:
        raise ValueError(f"the id {_CACHE!r} is taken by the batch's own folder.")
    prompt = row.get("prompt")
    if (prompt is None) == ("prompt_file" not in row):
        raise ValueError("give `prompt` or `prompt_file`.")
    for name, value in (("prompt", prompt), ("summary", row.get("summary"))):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"`{name}` must be a string.")
        if value is not None and not value.isascii():
            value.encode()  # a lone surrogate is no text
    values = {name: value for name, value in row.items() if name not in ("id", "prompt")}
    unknown = [name for name in values if name not in TrainConfig.model_fields or name in _COMMON]
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting of a row.")
    for name in _PATHS:
        if isinstance(values.get(name), str):
            values[name] = str((folder / values[name]).absolute())
    if isinstance(values.get("ae"), str):
        values["ae"] = absolute_ae(values["ae"], folder)
    if isinstance(values.get("init"), str):
        values["init"] = absolute_init(values["init"], folder)
    return Entry(be_id, values, prompt)


def train_batch(
    model: FrozenModel,
    entries: Sequence[Entry],
    settings: dict[str, Any],
    *,
    output: Path,
    run_dir: Path,
    say: Say = lambda text: None,
    quiet: bool = False,
    fresh: bool = False,
    decoder: Decoder | None = None,
) -> list[Outcome]:
    """Train a token for every entry, all in common steps; write `output/<id>.safetensors`.

    `settings` hold for all entries where a row does not say otherwise. A prompt that
    fails is told in its outcome and stops no other. Finished ones are skipped, so the
    same call continues an interrupted batch; `fresh` begins all anew. Raises Stopped after a signal.
    """
    output.mkdir(parents=True, exist_ok=True)
    outcomes = {entry.id: Outcome(entry.id) for entry in entries}
    ready = []
    try:
        for entry in entries:
            outcome = outcomes[entry.id]
            try:
                run = _run(model, entry, settings, output, run_dir, say, quiet, decoder)
                if fresh:
                    run.forget()
                if run.finished():
                    outcome.skipped = True
                    say(f"{entry.id}: finished before, skipped.")
                    continue
                say(f"{entry.id}:")
                ready.append((entry.id, run, run.prepare()))
            except BEError as exc:
                outcome.fault = str(exc)
                say(f"{entry.id}: {exc}")
    finally:
        if decoder:
            decoder.close()
    fit(model, [training for _, _, training in ready], quiet=quiet)
    for be_id, run, _ in ready:
        try:
            outcomes[be_id].result = run.finish()
        except BEError as exc:
            outcomes[be_id].fault = str(exc)
            say(f"{be_id}: {exc}")
    return list(outcomes.values())


def entry_config(entry: Entry, settings: dict[str, Any], output: Path, folder: Path = Path()) -> TrainConfig:
    """The settings of a row's run; a prompt in the row itself belongs into `folder`. Raises InputError."""
    values = TrainConfig.overridden(settings, entry.values)
    if values.get("ae"):
        values.setdefault("lam", 0.9)
    values |= {"id": entry.id, "output": str(output / f"{entry.id}.safetensors")}
    if entry.prompt is not None:
        values["prompt_file"] = str(folder / "prompt.txt")
    return make_config(values)


def _run(
    model: FrozenModel,
    entry: Entry,
    settings: dict[str, Any],
    output: Path,
    run_dir: Path,
    say: Say,
    quiet: bool,
    decoder: Decoder | None,
) -> Run:
    folder = run_dir / entry.id
    config = entry_config(entry, settings, output, folder)
    if entry.prompt is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(config.prompt_file), entry.prompt.encode())
    # Rows that differ in their settings alone share the teacher's responses.
    cache = run_dir / _CACHE
    cache.mkdir(parents=True, exist_ok=True)
    return Run(config, model, folder, cache=cache, decoder=decoder, say=say, quiet=quiet)
