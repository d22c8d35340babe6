"""The journal of a batch: writes each answer to disk as it arrives."""

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
    """A line or body as a JSON object; None if it is anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_output(output: str | Path, source: str | Path) -> Path:
    """The output's path. Raises InputError if it cannot be written, or if that would destroy another file."""
    path = Path(output)
    for target in (path, _journal_path(path)):
        with contextlib.suppress(OSError):
            if target.samefile(source):
                raise InputError(f"{target} is the input: name another output.")
            if not stat.S_ISREG(target.stat().st_mode):
                raise InputError(f"{target} is no plain file: name another output.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"Cannot write into {path.absolute().parent}: name an output in another folder.")
    return path


def _journal_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def _rename_to_old(path: Path) -> None:
    """Rename a file to *.old, *.old.1, ...: the first name that does not exist."""
    for n in itertools.count():
        old = path.with_name(f"{path.name}.old{f'.{n}' if n else ''}")
        if not old.exists():
            path.replace(old)
            return


class Journal:
    """The answers so far, one per line, in the file OUTPUT.part. Memory holds only their file positions and counts.

    with Journal(output, rows, {"model": ...}) as journal:
        journal.add(answer)
        journal.write(failed={})

    `made_by` names what the answers depend on besides the rows, such as the model. Raises InputError if the file
    holds answers to other rows or with another `made_by`, if another process has it open, or if `output` exists
    without a journal. `fresh` renames an existing output and journal to *.old, *.old.1, ...
    """

    def __init__(self, output: Path, rows: Sequence[BatchRow], made_by: dict[str, str], *, fresh: bool = False) -> None:
        self.output = output
        self.path = _journal_path(output)
        self.refused = 0
        self.digests: dict[str, set[str]] = {}
        """File digests of the tokens that answered, by id. An id has several if its token was replaced meanwhile."""
        self._rows = rows
        self._made_by = made_by
        self._fresh = fresh
        self._positions: dict[str, int] = {}
        self._kept = False

    def __enter__(self) -> Journal:
        if not self._fresh and self.output.exists() and not self.path.exists():
            raise InputError(f"{self.output} exists: name another output, or give --fresh to rename it to *.old.")
        try:
            self._file = self._open()
            if self._fresh:
                if self.output.exists():
                    _rename_to_old(self.output)
                if self._file.seek(0, os.SEEK_END):
                    _rename_to_old(self.path)
                    self._file.close()
                    self._file = self._open()
        except BlockingIOError as exc:
            raise InputError(f"Another run is writing {self.path}. Wait for it, or name another output.") from exc
        except OSError as exc:
            raise InputError(f"Cannot write {self.path}: {exc}.") from exc
        try:
            self._resume()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._positions and not self._kept and not self._file.closed:
            self.path.unlink(missing_ok=True)  # it has no answers, and would make the next run refuse other settings
        with contextlib.suppress(OSError):  # a full disk: `add` has raised this error before
            self._file.close()

    def _open(self) -> IO[bytes]:
        """Open and lock the journal. Only its owner may read the file."""
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and self.path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # another run has finished and removed this file: open a new one

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self._positions

    def add(self, answer: dict[str, Any]) -> None:
        """Write an answer to the journal. Raises BatchStopped if that fails, for example on a full disk."""
        try:
            position = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(answer).encode() + b"\n")
            self._file.flush()
        except OSError as exc:
            raise BatchStopped(f"Cannot write {self.path}: {exc}.") from exc
        self._count(answer, position)

    def write(self, failed: dict[str, dict[str, Any]]) -> None:
        """Write all answers to the output, in the order of the rows. Removes the journal unless rows failed.

        `failed` has the answers that are not in the journal, by custom_id. Raises InputError.
        """
        temporary = self.output.with_name(f".{self.output.name}.{uuid.uuid4().hex[:8]}")
        try:
            mode = self.output.stat().st_mode & 0o777 if self.output.exists() else 0o600  # the journal's mode
            with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
                os.fchmod(file.fileno(), mode)
                for row in self._rows:
                    if row.custom_id in self._positions:
                        self._file.seek(self._positions[row.custom_id])
                        file.write(self._file.readline())
                    else:
                        file.write(json.dumps(failed[row.custom_id]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.output)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise InputError(f"Cannot write {self.output}: {exc}. The answers are kept in {self.path}.") from exc
        self._kept = bool(failed)
        if not failed:
            self.path.unlink()
            self._file.close()

    def _resume(self) -> None:
        """Read the answers of an earlier run, or write the head of a new journal. Raises InputError."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps([row.custom_id, row.url]).encode() + row.content)
        head = {"be_serve_batch": "1", "rows": digest.hexdigest(), **self._made_by}
        self._file.seek(0)
        first = self._file.readline()
        found = json_object(first) or {}
        if first and "be_serve_batch" not in found:
            raise InputError(f"{self.path} is not the journal of a batch: name another output.")
        if found != head:
            if self._file.read(1):
                differs = [name for name in sorted({*head, *found}) if head.get(name) != found.get(name)]
                raise InputError(
                    f"{self.path} holds the answers of a run with other {', '.join(differs)}. Finish that run, name "
                    "another output, or give --fresh to rename the file to *.old."
                )
            self._file.truncate(0)
            self._file.seek(0)
            self._file.write(json.dumps(head).encode() + b"\n")
            self._file.flush()
        while True:
            position = self._file.tell()
            line = self._file.readline()
            if not line.endswith(b"\n"):
                if line:
                    self._file.truncate(position)  # an incomplete line: the last run stopped while it wrote
                return
            if answer := json_object(line):
                self._count(answer, position)

    def _count(self, answer: dict[str, Any], position: int) -> None:
        self._positions[answer["custom_id"]] = position
        self.refused += answer["error"] is not None
        headers = answer["response"].get("headers", {})
        ids, digests = headers.get("x-be-id", ""), headers.get("x-be-digest", "")
        for be_id, digest in zip(ids.split(","), digests.split(","), strict=False):
            if be_id and digest:
                self.digests.setdefault(be_id.strip(), set()).add(digest.strip())
