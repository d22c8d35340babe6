"""The answers so far, kept on disk as they come."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import stat
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from be_serve.batch.rows import BatchRow
from be_serve.core.errors import BatchStopped, InputError


def json_object(line: bytes) -> dict[str, Any] | None:
    """A line or body as a JSON object; None where it is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_output(output: str | Path, source: str | Path) -> Path:
    """The output's path. Raises InputError where writing it would lose a file, or cannot be done."""
    path = Path(output)
    for taken in (path, _part(path)):
        with contextlib.suppress(OSError):
            if taken.samefile(source):
                raise InputError(f"{taken} is the input: name another output.")
            if not stat.S_ISREG(taken.stat().st_mode):
                raise InputError(f"{taken} is no plain file: name another output.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"Cannot write into {path.absolute().parent}.")
    return path


def _part(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _set_aside(path: Path) -> None:
    """Rename a file to a name that no file has."""
    for n in itertools.count():
        aside = path.with_name(f"{path.name}.old{f'.{n}' if n else ''}")
        if not aside.exists():
            path.replace(aside)
            return


class Journal:
    """The answers so far, one a line, in OUTPUT.part; only places and counts are held in memory.

    with Journal(output, rows, {"model": ...}) as journal:
        journal.add(answer)
        journal.write(failed={})

    `made_by` is what the answers depend on besides the rows. Raises InputError where the
    file holds answers to other rows or made by something else, where another process has it
    open, and where `output` exists without a journal. `fresh` sets both aside as *.old, *.old.1, ...
    """

    def __init__(self, output: Path, rows: Sequence[BatchRow], made_by: dict[str, str], *, fresh: bool = False) -> None:
        self.output = output
        self.path = _part(output)
        self.refused = 0
        self.digests: dict[str, set[str]] = {}
        """File digests of the tokens that answered, by id: more than one where a token was replaced meanwhile."""
        self._rows = rows
        self._made_by = made_by
        self._fresh = fresh
        self._places: dict[str, int] = {}
        self._kept = False

    def __enter__(self) -> Journal:
        if not self._fresh and self.output.exists() and not self.path.exists():
            raise InputError(f"{self.output} exists: name another output, or give --fresh to set it aside.")
        try:
            self._file = self._open()
            if self._fresh:
                if self.output.exists():
                    _set_aside(self.output)
                if self._file.seek(0, os.SEEK_END):
                    _set_aside(self.path)
                    self._file.close()
                    self._file = self._open()
        except BlockingIOError as exc:
            raise InputError(f"Another run is writing {self.path}.") from exc
        except OSError as exc:
            raise InputError(f"Cannot write {self.path}: {exc}.") from exc
        try:
            self._take_up()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._places and not self._kept and not self._file.closed:
            self.path.unlink(missing_ok=True)  # nothing is lost, and a corrected command is not refused
        with contextlib.suppress(OSError):  # of a full disk, which `add` has told
            self._file.close()

    def _open(self) -> IO[bytes]:
        """The journal, locked, for its owner's eyes only."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # another run has just finished and removed it

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._places

    def add(self, answer: dict[str, Any]) -> None:
        """Keep an answer. Raises BatchStopped where the disk takes no more."""
        try:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(answer).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise BatchStopped(f"Cannot write {self.path}: {exc}.") from exc
        self._note(answer, place)

    def write(self, failed: dict[str, dict[str, Any]]) -> None:
        """Write all answers in the rows' order to the output. The journal goes, unless rows failed."""
        made = self.output.with_name(f".{self.output.name}.{uuid.uuid4().hex[:8]}")
        try:
            mode = self.output.stat().st_mode & 0o777 if self.output.exists() else 0o600  # as the journal's
            with open(made, "wb", opener=partial(os.open, mode=0o600)) as file:
                os.fchmod(file.fileno(), mode)
                for row in self._rows:
                    if row.custom_id in self._places:
                        self._file.seek(self._places[row.custom_id])
                        file.write(self._file.readline())
                    else:
                        file.write(json.dumps(failed[row.custom_id]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            made.replace(self.output)
        except OSError as exc:
            made.unlink(missing_ok=True)
            raise InputError(f"Cannot write {self.output}: {exc}. The answers are kept in {self.path}.") from exc
        self._kept = bool(failed)
        if not failed:
            self.path.unlink()
            self._file.close()

    def _take_up(self) -> None:
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps([row.custom_id, row.url]).encode() + row.content)
        head = {"be_serve_batch": "1", "rows": digest.hexdigest(), **self._made_by}
        self._file.seek(0)
        first = self._file.readline()
        found = json_object(first) or {}
        if first and "be_serve_batch" not in found:
            raise InputError(f"{self.path} is no journal of a batch: name another output.")
        if found != head:
            if self._file.read(1):
                differs = [name for name in sorted({*head, *found}) if head.get(name) != found.get(name)]
                raise InputError(
                    f"{self.path} holds the answers of a run with other {', '.join(differs)}. Finish that one, name "
                    "another output, or give --fresh to set its answers aside."
                )
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(head).encode() + b"\n")
            self._file.flush()
        while True:
            place = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                if line:
                    self._file.truncate(place)  # a line that a stop cut off
                return
            if answer := json_object(line):
                self._note(answer, place)

    def _note(self, answer: dict[str, Any], place: int) -> None:
        self._places[answer["custom_id"]] = place
        self.refused += answer["error"] is not None
        said = answer["response"].get("headers", {})
        ids, digests = said.get("x-be-id", ""), said.get("x-be-digest", "")
        for be_id, digest in zip(ids.split(","), digests.split(","), strict=False):
            if be_id and digest:
                self.digests.setdefault(be_id.strip(), set()).add(digest.strip())
