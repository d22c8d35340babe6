"""Batch files against a small app of our own; vLLM itself answers one in tests/integration/test_run_batch.py."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from be_serve.batch import BatchStopped, Journal, check_output, connect, read_rows, run_rows
from be_serve.core.errors import InputError

CHAT = "/v1/chat/completions"


def row(custom_id: str, **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body})


def write(path, *lines: str):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Answers:
    """An app that answers `say` in capitals, and does what a row tells it to do."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.busy = 2
        self.broken = True

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body["say"])
        match body["say"]:
            case "refuse":
                return JSONResponse({"error": {"message": "no such token", "code": 404}}, status_code=404)
            case "busy" if self.busy:
                self.busy -= 1
                return JSONResponse({"error": {"message": "later"}}, 503, headers={"Retry-After": "0"})
            case "break" if self.broken:
                return PlainTextResponse("it broke", 500)
        return JSONResponse({"id": "chat-1", "text": body["say"].upper()}, headers={"x-be-digest": "abc", "other": "x"})

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route(CHAT, self.chat, methods=["POST"])])


async def answer_all(rows, output, asgi, **options):
    """One call of the command: what failed, and the journal."""
    journal = Journal.open(output, rows, "model")
    async with connect("http://batch", asgi=asgi) as client:
        return await run_rows(client, rows, journal, **options), journal


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def test_answers_stand_in_the_rows_order_with_refusals_named(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", row("b", say="hi"), "", row("a", say="refuse"), row("c", say="busy")))
    failed, journal = await answer_all(rows, output, answers.app, concurrency=2)
    assert not failed
    journal.close(output, rows, failed)
    first, refused, waited = read(output)
    assert [line["custom_id"] for line in (first, refused, waited)] == ["b", "a", "c"]
    assert first["response"]["body"] == {"id": "chat-1", "text": "HI"}
    assert first["response"]["headers"] == {"x-be-digest": "abc"}
    assert (first["response"]["status_code"], first["response"]["request_id"], first["error"]) == (200, "chat-1", None)
    assert refused["response"]["status_code"] == 404
    assert refused["error"]["message"] == "no such token"
    assert waited["response"]["body"]["text"] == "BUSY"
    assert answers.asked.count("busy") == 3
    assert not journal.path.exists()


async def test_a_further_run_asks_only_what_has_no_answer(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(say, say=say) for say in ("hi", "refuse", "break")]))
    failed, journal = await answer_all(rows, output, answers.app)
    assert set(failed) == {"break"}
    assert failed["break"]["error"]["message"] == "it broke"
    with journal.path.open("a") as file:
        file.write('{"custom_id": "hi", "cut o')  # a stop in the middle of a line
    answers.broken, answers.asked = False, []
    failed, journal = await answer_all(rows, output, answers.app)
    assert answers.asked == ["break"]
    journal.close(output, rows, failed)
    assert [line["response"]["status_code"] for line in read(output)] == [200, 404, 200]


async def test_a_dead_engine_stops_the_batch_and_keeps_the_answers(tmp_path):
    answers, output = Answers(), tmp_path / "out.jsonl"
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(f"{n}", say=f"{n}") for n in range(20)]))
    with pytest.raises(BatchStopped, match=r"3 answers are kept in .*out\.jsonl\.part"):
        await answer_all(rows, output, answers.app, concurrency=1, alive=lambda: len(answers.asked) < 4)
    assert len(Journal.open(output, rows, "model").answers) == 3


async def test_a_server_that_is_not_there_stops_the_batch(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    journal = Journal.open(tmp_path / "out.jsonl", rows, "url")
    async with connect("http://127.0.0.1:9/v1") as client:
        with pytest.raises(BatchStopped, match="does not answer"):
            await run_rows(client, rows, journal)


def test_a_journal_of_another_batch_is_not_mixed_in(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    others = read_rows(write(tmp_path / "other.jsonl", row("a", say="ho")))
    Journal.open(tmp_path / "out.jsonl", rows, "model")
    for rows_then, model in ((others, "model"), (rows, "another")):
        with pytest.raises(InputError, match="--fresh"):
            Journal.open(tmp_path / "out.jsonl", rows_then, model)
    check_output(tmp_path / "out.jsonl", fresh=True)
    assert not Journal.open(tmp_path / "out.jsonl", others, "model").answers


def test_an_output_is_not_overwritten(tmp_path):
    output = write(tmp_path / "out.jsonl", "mine")
    with pytest.raises(InputError, match="exists"):
        check_output(output, fresh=False)
    with pytest.raises(InputError, match="Cannot write into"):
        check_output(tmp_path / "no" / "folder.jsonl", fresh=False)
    assert output.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "must be a JSON object"),
        ('{"custom_id": 1}', "custom_id"),
        ('{"custom_id": "a", "url": "/v1/be/tokens", "body": {}}', "`url` must be one of"),
        ('{"custom_id": "a", "url": "/v1/completions", "method": "DELETE", "body": {}}', "POST"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": []}', "`body`"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "whole answers"),
        ('{"custom_id": "first", "url": "/v1/completions", "body": {}}', "used before"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = write(tmp_path / "in.jsonl", row("first", say="hi"), line)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path)
    assert "line 2" in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no requests"):
        read_rows(write(tmp_path / "in.jsonl", ""))
