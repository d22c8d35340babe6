"""The registry on a real SQLite file."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from be_serve.core.errors import InvalidArtifact, RegistryError, SchemaMismatch, TokenConflict, TokenNotFound
from be_serve.registry import Registry, TokenIndex
from be_serve.registry.database import use_wal
from be_serve.registry.index import ByteLRU
from be_serve.serving.settings import Settings
from tests.factories import PROMPT, make_token


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'registry.db'}"


@pytest.fixture
def registry(url):
    return Registry(url)


def index_of(registry, **options):
    return TokenIndex(registry, prepare=lambda t: t.vectors, check=lambda t: None, **options)


def test_versions_are_immutable_and_idempotent_by_digest(registry):
    first, second = make_token(seed=1).to_bytes(), make_token(seed=2).to_bytes()
    put = registry.put(first)
    assert (put.created, put.record.version) == (True, 1)
    assert registry.put(first).created is False
    with pytest.raises(TokenConflict, match="replace=true"):
        registry.put(second)
    assert registry.put(second, replace=True).record.version == 2
    assert registry.read_artifact("harbor", 1) == first
    assert registry.read_artifact("harbor", 2) == second


def test_one_token_a_prompt(registry):
    registry.put(make_token("a").to_bytes(), match=True)
    with pytest.raises(TokenConflict, match=r"'a'.*--id a --no-match`\), or remove 'a'"):
        registry.put(make_token("b", seed=1).to_bytes(), match=True)
    assert registry.put(make_token("b", seed=1).to_bytes()).created
    # Both ways out.
    registry.put(make_token("a").to_bytes(), match=False)
    assert registry.put(make_token("b", seed=1).to_bytes(), match=True).record.match_sha256 is not None
    registry.put(make_token("b", seed=1).to_bytes(), match=False)
    registry.put(make_token("a").to_bytes(), match=True)
    registry.remove("a")
    put = registry.put(make_token("b", seed=1).to_bytes(), match=True)
    assert put.created is False
    assert put.record.match_sha256 is not None


def test_a_replaced_token_keeps_its_match_only_for_the_same_prompt(registry):
    registry.put(make_token(seed=1).to_bytes(), match=True)
    assert registry.put(make_token(seed=2).to_bytes(), replace=True).record.match_sha256 is not None
    other = make_token(seed=3, prompt="Another prompt.").to_bytes()
    assert registry.put(other, replace=True).record.match_sha256 is None


@pytest.mark.parametrize("attempt", range(5))
def test_servers_that_start_together_make_one_registry(tmp_path, attempt):
    """API processes of one server open the same new database in the same moment."""
    barrier = threading.Barrier(8)

    def start(_: int) -> int:
        barrier.wait()
        registry = Registry(f"sqlite:///{tmp_path / 'new.db'}")
        revision, _changes = registry.changes()
        registry.close()
        return revision

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(start, range(8))) == [0] * 8


def test_the_switch_to_the_log_is_tried_again_while_others_switch():
    """SQLite does not wait there: where twelve started together on a new file, one start in fifteen met it."""

    class Connection:
        answers = iter(["database is locked", "database is locked", None, "disk I/O error"])

        def execute(self, statement: str) -> None:
            if fault := next(self.answers):
                raise sqlite3.OperationalError(fault)

    connection = Connection()
    use_wal(connection)
    assert list(connection.answers) == ["disk I/O error"]
    connection.answers = iter(["disk I/O error"])
    with pytest.raises(sqlite3.OperationalError, match="disk"):
        use_wal(connection)


def test_match_is_switched_off_and_left_as_it_is(registry):
    data = make_token(seed=1).to_bytes()
    registry.put(data, match=True)
    assert registry.put(data).record.match_sha256 is not None
    assert registry.put(data, match=False).record.match_sha256 is None
    registry.put(data, match=True)
    assert registry.put(make_token(seed=2).to_bytes(), match=False, replace=True).record.match_sha256 is None


def test_removal_deletes_the_vectors_and_numbers_go_on(registry):
    registry.put(make_token().to_bytes())
    registry.remove("harbor")
    with pytest.raises(TokenNotFound):
        registry.read_artifact("harbor", 1)
    with pytest.raises(TokenNotFound):
        registry.remove("harbor")
    assert registry.put(make_token(seed=4).to_bytes()).record.version == 2


def test_damaged_bytes_leave_nothing(registry):
    with pytest.raises(InvalidArtifact):
        registry.put(make_token().to_bytes()[:-3])
    assert registry.changes(0)[1] == []


def test_index_follows_another_process(url):
    writer, reader = Registry(url), Registry(url)
    index = index_of(reader, poll_seconds=0.05)
    index.start()
    try:
        writer.put(make_token().to_bytes(), match=True)
        sha = make_token().manifest.prompt.sha256
        _eventually(lambda: index.match(sha) is not None)
        assert index.load(index.get("harbor")).shape == (2, 8)
        writer.put(make_token(seed=5).to_bytes(), replace=True)
        _eventually(lambda: index.get("harbor").version == 2)
        assert (index.load(index.get("harbor")) == make_token(seed=5).vectors).all()
        writer.remove("harbor")
        _eventually(lambda: index.records() == [])
        assert index.match(sha) is None
    finally:
        index.stop()


def test_the_mark_tells_of_every_commit_and_of_nothing_else(tmp_path):
    file = tmp_path / "r.db"
    registry, other = Registry(f"sqlite:///{file}"), Registry(f"sqlite:///{file}")
    marks = [registry.mark(), registry.mark()]
    registry.changes(0)
    marks.append(registry.mark())
    assert marks[0] is not None
    assert len(set(marks)) == 1
    for commit in (
        lambda: other.put(make_token().to_bytes()),
        lambda: registry.store_prompt("harbor", PROMPT),
        lambda: other.remove("harbor"),
        lambda: shutil.copy(file, tmp_path / "copy.db") and os.replace(tmp_path / "copy.db", file),
    ):
        commit()
        marks.append(registry.mark())
        assert marks[-1] not in marks[:-1]
    file.unlink()
    assert registry.mark() is None
    assert Registry("sqlite://").mark() is None


def test_an_idle_registry_is_hardly_read(tmp_path, monkeypatch):
    registry = Registry(f"sqlite:///{tmp_path / 'r.db'}")
    index = index_of(registry, poll_seconds=0.01)
    index.start()
    reads, marks = [], []
    changes, mark = registry.changes, registry.mark
    monkeypatch.setattr(registry, "changes", lambda since: reads.append(since) or changes(since))
    monkeypatch.setattr(registry, "mark", lambda: marks.append(1) or mark())
    try:
        _eventually(lambda: len(marks) > 60)
        assert 1 <= len(reads) <= 6
        Registry(registry.url).put(make_token().to_bytes())
        _eventually(lambda: [r.id for r in index.records()] == ["harbor"])
    finally:
        index.stop()


def test_static_tokens_stay_out_of_the_registry(registry):
    index = index_of(registry)
    index.add_static("fixed", make_token().to_bytes())
    assert index.get("fixed").source == "server"
    assert index.load(index.get("fixed")).shape == (2, 8)
    with pytest.raises(TokenConflict):
        index.refuse_static("fixed")
    assert registry.changes(0)[1] == []


def test_concurrent_writers_lose_nothing(url):
    Registry(url)
    failures = []

    def work(worker: int) -> None:
        try:
            mine = Registry(url)
            for i in range(10):
                mine.put(make_token(f"w{worker}-{i}", seed=i).to_bytes())
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert failures == []
    revision, changes = Registry(url).changes(0)
    assert len(changes) == 40
    assert revision == 40


def test_kill_9_in_a_registration_leaves_it_whole_or_absent(url, tmp_path):
    """A process that registers without pause is killed at a random moment, several times."""
    script = textwrap.dedent("""
        import sys, itertools
        from be_serve.registry import Registry
        from tests.factories import PROMPT, make_token
        registry = Registry(sys.argv[1])
        print("ready", flush=True)
        for i in itertools.count():
            registry.put(make_token(f"{sys.argv[2]}-{i}", k=16, hidden_size=4096, seed=i).to_bytes())
    """)
    for run, delay in enumerate((0.02, 0.11, 0.23)):
        child = subprocess.Popen(
            [sys.executable, "-c", script, url, f"run{run}"], stdout=subprocess.PIPE, text=True, cwd=_root()
        )
        assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        registry = Registry(url)
        for change in registry.changes(0)[1]:
            index_of(registry).load(change.record)  # every listed token is whole
    registry.put(make_token("after").to_bytes())
    path = url.removeprefix("sqlite:///")
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_newer_schema_is_refused(url, registry):
    registry.close()
    with sqlite3.connect(url.removeprefix("sqlite:///")) as db:
        db.execute("UPDATE be_meta SET schema_version = 99")
    with pytest.raises(SchemaMismatch, match="Upgrade be-serve"):
        Registry(url)


@pytest.mark.parametrize("bad", ["nonsense", "sqlite:////proc/none/x.db", "postgresql+nodriver://h/db"])
def test_bad_urls_say_so(bad):
    with pytest.raises(RegistryError):
        Registry(bad)


def test_a_user_and_host_are_no_relative_sqlite_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RegistryError, match="four slashes") as caught:
        Registry("sqlite:///x:hunter2@host/db")
    assert "hunter2" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a@b").mkdir()
    Registry(f"sqlite:///{tmp_path}/a@b/r.db").close()


@pytest.mark.parametrize(
    "user_info",
    [
        "user:hunter2",
        "user:hun@ter2",
        "user:hun@ter2:x",
        "user:hun/ter2",
        "user:hun:ter2",
        "user:hun#ter2",
        "user:hun?ter2",
        "user:hun%ter2",
        "user:hun%40ter2",
        "user:hun@ter2/x",
        "user:hun ter2",
        "user:hun'ter2",
        "hunter2@user",
        "user@hun:ter2@x",
        "user:[hun]ter2",
        "//user:hunter2",
    ],
)
@pytest.mark.parametrize(
    "rest", ["@127.0.0.1:1/db", "@127.0.0.1:hun/db", "@/db", "@host.invalid/db?sslmode=hunter2", "/db"]
)
def test_no_part_of_a_password_stands_in_a_message_or_traceback(user_info, rest):
    drivers = ("postgresql+psycopg", "postgresql", "nonsense", *(() if user_info.startswith("/") else ("sqlite",)))
    for driver in drivers:  # sqlite:////user: is a file's name
        if rest == "/db" and "@" in user_info:
            continue  # what stands behind a single @ is a host to everyone
        with pytest.raises(RegistryError) as caught:
            Registry(f"{driver}://{user_info}{rest}")
        _tells_nothing(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://127.0.0.1:1/db?user=me&password=hunter2",
        "postgresql+psycopg://127.0.0.1:1/db?password=hun&ter2=x",
        "postgresql+psycopg://127.0.0.1:1/db?pass%77ord=hun@ter2",
        "postgresql+psycopg://127.0.0.1:1/db?sslpassword=hunter2&sslmode=require",
        "postgresql+psycopg:///?service=mine&password=hun@ter2",
        "host=127.0.0.1 port=1 password=hunter2",
        "service=hunter2",
        "user:hunter2@host/db",
        "postgresql:/user:hunter2@host/db",
    ],
)
def test_no_part_of_a_password_in_a_parameter_stands_in_a_message_or_traceback(url):
    with pytest.raises(RegistryError) as caught:
        Registry(url)
    _tells_nothing(caught.value)


def _tells_nothing(exc: RegistryError) -> None:
    told = f"{exc} {exc.message} {''.join(traceback.format_exception(exc))}"
    # This file's own lines stand in the traceback, with the test's parameters by their names alone.
    assert "hun" not in told, told
    assert "ter2" not in told, told


def test_a_refused_url_says_what_to_write():
    with pytest.raises(RegistryError, match=r"postgresql://\*\*\*@host/db\. .*write @ as %40"):
        Registry("postgresql://user:p@ss@host/db")


def test_the_texts_of_a_failing_database_are_kept(tmp_path):
    with pytest.raises(
        RegistryError, match=r"postgresql\+psycopg://\*\*\*@127.0.0.1:1/db failed: .*Connection refused"
    ):
        Registry("postgresql+psycopg://user:hunter2@127.0.0.1:1/db")


def test_the_log_of_a_failing_registry_shows_no_password(registry, caplog, monkeypatch):
    index = index_of(registry, poll_seconds=0.01)
    index.start()

    def mark():
        raise OSError("connection to postgresql://user:hun@ter2@host/db failed, password=hunter2")

    monkeypatch.setattr(registry, "mark", mark)
    _eventually(lambda: not index.healthy)
    index.stop()
    assert "Tokens in memory still answer" in caplog.text
    assert "hun" not in caplog.text


def test_the_log_of_a_manifest_that_cannot_be_read_shows_no_prompt(registry, url, caplog):
    registry.put(make_token().to_bytes())
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("""UPDATE be_version SET manifest = '{"prompt": {"text": ["You are a pirate."]}}'""")
    assert registry.changes()[1][0].record is None
    assert "prompt.text: " in caplog.text
    assert "pirate" not in caplog.text


def test_settings_shown_by_chance_hold_no_secret():
    shown = repr(Settings.from_env({"BE_ADMIN_KEY": "hunter2", "BE_REGISTRY": "postgresql://user:hunter2@host/db"}))
    assert "hunter2" not in shown


def test_lru_is_bounded_by_bytes():
    lru = ByteLRU(100)
    lru.put("a", 1, 60)
    lru.put("b", 2, 40)
    assert lru.get("a") == 1
    lru.put("c", 3, 30)  # evicts b, the least recently used
    assert lru.get("b") is None
    assert lru.get("a") == 1
    assert lru.used == 90
    lru.put("huge", 4, 101)
    assert lru.get("huge") is None


def _eventually(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


def _root():
    from pathlib import Path

    return Path(__file__).parents[3]


def test_a_prompt_is_kept_by_choice_and_only_the_tokens_own(registry):
    registry.put(make_token().to_bytes())
    assert registry.read_prompt("harbor") is None
    with pytest.raises(InvalidArtifact, match="not the prompt"):
        registry.store_prompt("harbor", "Another.")
    registry.store_prompt("harbor", PROMPT)
    (change,) = registry.changes()[1]
    assert change.record.stored_prompt
    assert registry.put(make_token().to_bytes()).record.stored_prompt
    registry.put(make_token(seed=2).to_bytes(), replace=True)  # the same prompt's
    assert registry.read_prompt("harbor") == PROMPT
    registry.remove("harbor")
    assert registry.read_prompt("harbor") == PROMPT
    with pytest.raises(TokenNotFound):
        registry.store_prompt("harbor", PROMPT)
    registry.put(make_token(prompt="Another.").to_bytes())
    assert registry.read_prompt("harbor") is None  # the new token's prompt is another


def test_a_removed_tokens_prompt_can_be_forgotten(registry):
    registry.put(make_token().to_bytes())
    registry.store_prompt("harbor", PROMPT)
    registry.remove("harbor")
    registry.remove("harbor", prompt=True)
    assert registry.read_prompt("harbor") is None
    with pytest.raises(TokenNotFound):
        registry.remove("harbor", prompt=True)


def test_a_database_from_before_prompts_were_kept(tmp_path):

    url = f"sqlite:///{tmp_path / 'old.db'}"
    old = Registry(url)
    old.put(make_token().to_bytes())
    old.close()
    with sqlite3.connect(tmp_path / "old.db") as database:
        database.execute("DROP TABLE be_prompt")
    found = Registry(url)
    assert found.read_prompt("harbor") is None
    found.store_prompt("harbor", PROMPT)
    assert found.read_prompt("harbor") == PROMPT


def test_replicas_learn_of_prompts_of_removed_tokens(registry):
    index = index_of(registry)
    registry.put(make_token().to_bytes())
    registry.store_prompt("harbor", PROMPT)
    registry.remove("harbor")
    index.refresh()
    assert index.prompt("harbor") == PROMPT
    registry.remove("harbor", prompt=True)
    index.refresh()
    assert index.prompt("harbor") is None
    assert index.prompt("nobody") is None


def test_a_stored_text_of_another_prompt_does_not_count(registry, url):
    """An older server replaces a token and knows nothing of stored prompts."""
    registry.put(make_token().to_bytes())
    registry.store_prompt("harbor", PROMPT)
    registry.put(make_token(prompt="Another.").to_bytes(), replace=True)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as database:
        database.execute("INSERT INTO be_prompt VALUES ('harbor', 'aa', 'You are a pirate.')")
        database.execute("UPDATE be_meta SET revision = revision + 1")
        database.execute("UPDATE be_token SET revision = (SELECT revision FROM be_meta)")
    index = index_of(registry)
    index.refresh()
    assert index.prompt("harbor") is None
    assert not index.get("harbor").stored_prompt


def test_the_public_record_shows_no_prompt(registry):
    """Neither one that was stored nor one that stands in the token's file."""
    record = registry.put(make_token(text=PROMPT).to_bytes()).record
    assert record.manifest.prompt.text == PROMPT
    assert PROMPT not in str(record.public())
    assert record.public()["fallback"] is True
    index = index_of(registry)
    index.refresh()
    assert index.has_prompt("harbor")
    assert not index.has_prompt("nobody")
