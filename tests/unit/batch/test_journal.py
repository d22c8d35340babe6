"""The journal of a batch: what a run keeps, and what it never overwrites."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal

import pytest

from be_serve.batch import Journal, check_output, read_rows
from be_serve.core.errors import BatchStopped, InputError
from tests.unit.batch.fake import MODEL, row, write


def test_a_full_disk_is_told_once_and_keeps_what_was_written(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi"), row("b", say="hi")))
    answer = {"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal:
            journal.add(answer)
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 10, limit[1]))
            with pytest.raises(BatchStopped, match="Cannot write"):
                journal.add({**answer, "custom_id": "b", "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal:
        assert len(journal) == 1


def test_a_journal_of_another_batch_is_not_mixed_in(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    others = read_rows(write(tmp_path / "other.jsonl", row("a", say="ho")))
    output = tmp_path / "out.jsonl"
    kept = {"custom_id": "a", "error": None, "response": {}}
    with Journal(output, rows, MODEL) as journal:
        journal.add(kept)
    for rows_then, made_by, differs in ((others, MODEL, "rows"), (rows, {"model": "n"}, "model")):
        with pytest.raises(InputError, match=f"with other {differs}"), Journal(output, rows_then, made_by):
            pass
    for _ in range(2):
        with Journal(output, others, MODEL, fresh=True) as journal:
            assert not len(journal)
            journal.add(kept)
    assert json.loads((tmp_path / "out.jsonl.part.old").read_text().splitlines()[1]) == kept
    assert (tmp_path / "out.jsonl.part.old.1").exists()
    assert journal.path.stat().st_mode & 0o777 == 0o600


def test_a_journal_without_answers_is_taken_over_whole(tmp_path):
    """A kill while the model loads leaves a head alone; other options then begin anew, and lose nothing later."""
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi"), row("b", say="hi")))
    output = tmp_path / "out.jsonl"
    with Journal(output, rows, {"model": "a longer name than the next"}) as journal:
        head = journal.path.read_bytes()
    journal.path.write_bytes(head)
    for custom_id in ("a", "b"):
        with Journal(output, rows, MODEL) as journal:
            journal.add({"custom_id": custom_id, "error": None, "response": {}})
    assert journal.path.read_bytes().count(b"\n") == 3
    with Journal(output, rows, MODEL) as journal:
        assert len(journal) == 2
    (tmp_path / "mine.part").write_text("my own file\n")
    with pytest.raises(InputError, match="not the journal of a batch"), Journal(tmp_path / "mine", rows, MODEL):
        pass


def test_two_runs_do_not_write_one_output(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    with (tmp_path / "out.jsonl.part").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for fresh in (False, True):
            journal = Journal(tmp_path / "out.jsonl", rows, MODEL, fresh=fresh)
            with pytest.raises(InputError, match="Another run is writing"), journal:
                pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl.part"]


def test_no_file_is_lost(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    output = write(tmp_path / "out.jsonl", "mine")
    with pytest.raises(InputError, match="exists"), Journal(output, rows, MODEL):
        pass
    with Journal(output, rows, MODEL, fresh=True):
        pass
    assert (tmp_path / "out.jsonl.old").read_text() == "mine\n"
    os.link(tmp_path / "in.jsonl", tmp_path / "link.jsonl")
    for path, message in (
        (tmp_path / "no" / "folder.jsonl", "Cannot write into"),
        (tmp_path, "no plain file"),
        ("/dev/null", "no plain file"),
        (tmp_path / "link.jsonl", "is the input"),
        (tmp_path / "in.jsonl", "is the input"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(path, tmp_path / "in.jsonl")
    source = write(tmp_path / "z.jsonl.part", row("a", say="hi"))
    with pytest.raises(InputError, match="is the input"):
        check_output(tmp_path / "z.jsonl", source)


def test_answers_are_for_their_owners_eyes(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    output = tmp_path / "out.jsonl"
    for mode in (0o600, 0o640):  # a new file; one whose owner opened it to others
        with Journal(output, rows, MODEL, fresh=True) as journal:
            journal.add({"custom_id": "a", "error": None, "response": {}})
            if mode != 0o600:
                output.touch()
                output.chmod(mode)
            journal.write({})
        assert output.stat().st_mode & 0o777 == mode
