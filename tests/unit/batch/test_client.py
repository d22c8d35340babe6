"""Asking a batch's rows of a small app of our own; vLLM itself answers one in tests/integration/test_run_batch.py."""

from __future__ import annotations

import pytest

from be_serve.batch import Journal, connect, read_rows, run_rows
from be_serve.core.errors import BatchStopped, InputError
from tests.unit.batch.fake import MODEL, Answers, read, row, run, write


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("be_serve.batch.client._LONGEST_WAIT", 0.01)


async def test_answers_stand_in_the_rows_order_with_refusals_named(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    lines = (row("b", say="hi\u2028\u0085"), "", row("a", say="refuse"), row("c", say="busy"))
    rows = read_rows(write(tmp_path / "in.jsonl", *lines))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, concurrency=2)
        assert not failed
        assert journal.refused == 1
        journal.write(failed)
    first, refused, waited = read(output)
    assert [line["custom_id"] for line in (first, refused, waited)] == ["b", "a", "c"]
    assert first["response"]["body"] == {"id": "chat-1", "text": "HI\u2028\u0085"}
    assert first["response"]["headers"] == {"x-be-id": "captain", "x-be-digest": "abc"}
    assert (first["response"]["status_code"], first["response"]["request_id"], first["error"]) == (200, "chat-1", None)
    assert refused["response"]["status_code"] == 404
    assert refused["error"]["message"] == "no such token"
    assert waited["response"]["body"]["text"] == "BUSY"
    assert answers.asked.count("busy") == 3
    assert not journal.path.exists()


async def test_a_further_run_asks_only_what_has_no_answer(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(say, say=say) for say in ("hi", "break", "refuse")]))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers)
        assert set(failed) == {"break"}
        journal.write(failed)
    assert answers.asked.count("break") == 3
    assert [line["response"]["status_code"] for line in read(output)] == [200, 500, 404]
    assert read(output)[1]["error"]["message"] == "it broke"
    with journal.path.open("a") as file:
        file.write('{"custom_id": "break", "cut o')  # a stop in the middle of a line
    answers.broken, answers.asked, answers.digest = False, [], "def"
    with Journal(output, rows, MODEL) as journal:
        assert (len(journal), journal.refused) == (2, 1)
        journal.write(await run(rows, journal, answers))
        assert journal.digests == {"captain": {"abc", "def"}}
    assert answers.asked == ["break"]
    assert [line["response"]["status_code"] for line in read(output)] == [200, 200, 404]
    assert not journal.path.exists()


async def test_a_dead_server_stops_the_batch_and_keeps_the_answers(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", row("1", say="hi"), row("2", say="ho"), row("3", say="break")))
    with (
        Journal(output, rows, MODEL) as journal,
        pytest.raises(BatchStopped, match=r"The server ended.*2 answers are kept in .*out\.jsonl\.part"),
    ):
        await run(rows, journal, answers, concurrency=1, alive=lambda: False)
    with Journal(output, rows, MODEL) as journal:
        assert len(journal) == 2


@pytest.mark.parametrize(
    ("say", "message"),
    [
        ("moved", "it points to https://elsewhere/"),
        ("key", "answered 401: Unauthorized"),
        ("nowhere", "answered 404: Not Found"),
        ("login", "answered 200"),
    ],
)
async def test_a_wrong_server_is_no_answer(tmp_path, say, message):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say=say)))
    with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal, pytest.raises(BatchStopped, match=message):
        await run(rows, journal, Answers())
    assert not journal.path.exists()  # nothing was answered: a corrected command begins anew


async def test_what_only_one_row_meets_does_not_stop_the_others(tmp_path):
    """A gateway's limit, a row that never ends or kills: the others are answered, and these are asked again."""
    answers, output = Answers(), tmp_path / "out.jsonl"
    says = ("hi", "blocked", "too large", "slow", "kill", "ho")
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(say, say=say) for say in says]))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, concurrency=1)
        assert set(failed) == {"blocked", "too large", "slow", "kill"}
        journal.write(failed)
    assert answers.asked.count("slow") == answers.asked.count("kill") == 3
    found = {line["custom_id"]: line for line in read(output)}
    assert found["slow"]["response"] is None
    assert "ReadTimeout" in found["slow"]["error"]["message"]
    assert found["blocked"]["response"]["status_code"] == 403
    assert found["ho"]["error"] is None
    with Journal(output, rows, MODEL) as journal:
        assert len(journal) == 2


async def test_a_row_that_kills_the_server_takes_no_other_with_it(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    says = ["beside"] * 3 + ["kill"] + ["beside"] * 8
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(str(i), say=say) for i, say in enumerate(says)]))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, concurrency=6)
        assert set(failed) == {"3"}
        assert len(journal) == len(says) - 1
    assert answers.asked.count("kill") == 3


async def test_where_every_row_failed_the_same_command_asks_them_again(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", row("1", say="break")))
    with Journal(output, rows, MODEL) as journal:
        journal.write(await run(rows, journal, answers))
    answers.broken = False
    with Journal(output, rows, MODEL) as journal:
        journal.write(await run(rows, journal, answers))
    assert [line["error"] for line in read(output)] == [None]


async def test_trouble_at_the_end_of_a_slow_answer_is_waited_for(tmp_path):
    """Patience counts from a row's own trouble: nothing had been answered for longer than that before it."""
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", row("1", say="late")))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, patience=0.15)
        assert not failed
    assert answers.asked == ["late", "late"]


async def test_a_row_for_which_there_is_never_room_does_not_keep_the_others_answers(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="never"), row("b", say="hi"), row("c", say="hi")))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, patience=0.1, concurrency=1 + 1)
        assert set(failed) == {"a"}
        journal.write(failed)
    never, *others = read(output)
    assert (never["response"]["status_code"], never["error"]["message"]) == (503, "no room")
    assert [line["error"] for line in others] == [None, None]
    only = read_rows(write(tmp_path / "only.jsonl", row("a", say="never")))
    journal = Journal(tmp_path / "other.jsonl", only, MODEL)
    with journal, pytest.raises(BatchStopped, match="no room"):  # nothing shows that the server serves at all
        await run(only, journal, answers, patience=0.1)


async def test_a_hostile_answer_is_no_answer(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi"), row("b", say="deep")))
    with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal:
        with pytest.raises(BatchStopped, match="200"):
            await run(rows, journal, Answers(), concurrency=1)
        assert "a" in journal


async def test_a_server_that_is_not_there_is_waited_for_and_then_given_up(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal:
        async with connect("http://127.0.0.1:9/v1") as client:
            with pytest.raises(BatchStopped, match=r"No row was answered for 0 s\. The server does not answer"):
                await run_rows(client, rows, journal, patience=0.05)


async def test_a_key_travels_whole_and_stays_out_of_errors():
    async with connect("http://h", key=" secret\n") as client:
        assert client.headers["authorization"] == "Bearer secret"
    for url, key in (
        ("http://u:secret@h", None),
        ("http://h", "sécret"),
        ("ftp://secret", None),
        ("http://h:secret", None),
    ):
        with pytest.raises(InputError) as caught:
            async with connect(url, key=key):
                pass
        assert "secret" not in str(caught.value)
