"""Batch files against a small app of our own; vLLM itself answers one in tests/integration/test_run_batch.py."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from be_serve.batch import BatchStopped, Journal, check_output, connect, read_rows, run_rows
from be_serve.cli.main import cli, main
from be_serve.cli.run_batch import _made_by
from be_serve.cli.run_batch import command as run_batch_command
from be_serve.cli.serve import command as serve_command
from be_serve.core.errors import InputError

CHAT = "/v1/chat/completions"
MODEL = {"model": "m"}


def row(custom_id: str, **body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}, ensure_ascii=False)


def write(path, *lines: str):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


class Answers:
    """An app that answers `say` in capitals, and does what a row tells it to do."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.busy = 2
        self.broken = True
        self.digest = "abc"

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body["say"])
        match body["say"]:
            case "refuse":
                return JSONResponse({"error": {"message": "no such token", "code": 404}}, status_code=404)
            case "busy" if self.busy:
                self.busy -= 1
                return JSONResponse({"error": {"message": "later"}}, 503 - self.busy, headers={"Retry-After": "0"})
            case "late" if self.asked == ["late"]:
                await asyncio.sleep(0.3)
                return JSONResponse({"error": {"message": "later"}}, 503)
            case "break" if self.broken:
                return PlainTextResponse("it broke", 500)
            case "moved":
                return RedirectResponse("https://elsewhere/", 301)
            case "login":
                return PlainTextResponse("<html>login</html>")
            case "key":
                return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
            case "nowhere":
                return JSONResponse({"error": {"message": "Not Found", "code": 404}}, 404)
            case "blocked" | "too large":
                return PlainTextResponse("<html>no</html>", {"blocked": 403, "too large": 413}[body["say"]])
            case "never":
                return JSONResponse({"error": {"message": "no room"}}, 503, headers={"Retry-After": "\u00b2"})
            case "deep":
                return PlainTextResponse("[" * 100_000, 200)
            case "slow":
                raise httpx.ReadTimeout("too slow")
        headers = {"x-be-id": "captain", "x-be-digest": self.digest, "other": "x"}
        return JSONResponse({"id": "chat-1", "text": body["say"].upper()}, headers=headers)

    @property
    def transport(self) -> httpx.ASGITransport:
        return httpx.ASGITransport(Starlette(routes=[Route(CHAT, self.chat, methods=["POST"])]))


async def run(rows, journal, answers: Answers, **options):
    async with connect("http://batch", transport=answers.transport) as client:
        return await run_rows(client, rows, journal, **options)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("be_serve.batch.asking._LONGEST_WAIT", 0.01)


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    """A gateway's limit or a row that never ends: the others are answered, and these are asked again."""
    answers, output = Answers(), tmp_path / "out.jsonl"
    says = ("hi", "blocked", "too large", "slow", "ho")
    rows = read_rows(write(tmp_path / "in.jsonl", *[row(say, say=say) for say in says]))
    with Journal(output, rows, MODEL) as journal:
        failed = await run(rows, journal, answers, concurrency=1)
        assert set(failed) == {"blocked", "too large", "slow"}
        journal.write(failed)
    assert answers.asked.count("slow") == 3
    found = {line["custom_id"]: line for line in read(output)}
    assert found["slow"]["response"] is None
    assert "ReadTimeout" in found["slow"]["error"]["message"]
    assert found["blocked"]["response"]["status_code"] == 403
    assert found["ho"]["error"] is None
    with Journal(output, rows, MODEL) as journal:
        assert len(journal) == 2


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


async def test_a_server_that_is_not_there_is_waited_for_and_then_given_up(tmp_path):
    rows = read_rows(write(tmp_path / "in.jsonl", row("a", say="hi")))
    with Journal(tmp_path / "out.jsonl", rows, MODEL) as journal:
        async with connect("http://127.0.0.1:9/v1") as client:
            with pytest.raises(BatchStopped, match=r"Nothing was answered for 0 s\. The server does not answer"):
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
    with pytest.raises(InputError, match="no journal"), Journal(tmp_path / "mine", rows, MODEL):
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


def test_a_file_may_begin_with_a_mark_but_not_be_empty(tmp_path):
    (tmp_path / "in.jsonl").write_text("\ufeff" + row("a", say="hi"), encoding="utf-8")
    assert len(read_rows(tmp_path / "in.jsonl")) == 1
    with pytest.raises(InputError, match="no requests"):
        read_rows(write(tmp_path / "empty.jsonl", ""))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "http://h", "--concurency=8"], "nobody reads MODEL"),
        (["--url", "http://h", "--be-token", "a=b"], "nobody reads --be-token"),
        (["--url", "http://h", "m", "--api-key", "SECRET"], "nobody reads MODEL, --api-key"),
        (["--url", ""], "--url is empty"),
        (["--url", "http://h", "--start-timeout", "5"], "nobody reads --start-timeout"),
        (["m", "--vllm-api-key", "SECRET"], "nobody reads --vllm-api-key"),
        (["m", "--port=3"], "leave out --port"),
        (["--enforce-eager", "m"], "Name the model first"),
    ],
)
def test_a_command_that_would_be_misread_is_refused(tmp_path, words, message):
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    with pytest.raises(InputError, match=message) as caught:
        cli(["run-batch", *files, *words], standalone_mode=False)
    assert "SECRET" not in str(caught.value)


def test_words_of_vllm_behind_one_dash_stay_whole():
    words = ["m", "-dph", "-cc.mode=3", "-tp", "2", "--be-rows", "8", "-O3"]
    context = serve_command.make_context("serve", words)
    assert context.args == ["-dph", "-cc.mode=3", "-tp", "2", "-O3"]
    assert context.params["be_rows"] == 8


def test_values_that_begin_with_a_dash_stay_whole():
    context = serve_command.make_context("serve", ["m", "--be-admin-key", "-Ab12", "--be-token", "-a=b"])
    assert context.params["be_admin_key"] == "-Ab12"
    assert context.params["be_token"] == ("-a=b",)
    context = run_batch_command.make_context("run-batch", ["m", "-iin.jsonl", "-o", "-out.jsonl", "-tp", "2"])
    assert (context.params["input_file"], context.params["output_file"]) == ("in.jsonl", "-out.jsonl")
    assert context.args == ["-tp", "2"]


def test_what_the_answers_depend_on(tmp_path, monkeypatch):
    token, config = tmp_path / "t.safetensors", tmp_path / "c.yaml"
    token.write_bytes(b"one")
    config.write_text("dtype: float32")
    settings = {"BE_TOKEN": f"a={token}"}

    def made_by(arguments=("--config", str(config)), **more):
        return _made_by("m", arguments, settings | more)

    first = made_by()
    assert first == made_by(BE_ADMIN_KEY="secret")
    assert "secret" not in str(made_by(arguments=["--hf-token", "secret"]))
    monkeypatch.setenv("BE_MATCH", "0")
    assert first["options"] != made_by()["options"]
    monkeypatch.delenv("BE_MATCH")
    assert first["options"] != made_by(BE_INJECTION="prompt-embeds")["options"]
    config.write_text("dtype: bfloat16")
    second = made_by()
    assert first["files"] != second["files"]
    token.write_bytes(b"two")
    assert second["files"] != made_by()["files"]


def test_the_exit_status_of_a_command_reaches_the_shell(monkeypatch):
    monkeypatch.setattr("be_serve.cli.main.cli", lambda standalone_mode: 3)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 3
