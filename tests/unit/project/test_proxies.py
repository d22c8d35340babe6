"""What our HTTP clients send to a proxy of the environment, and where a redirect points: real servers take notes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from be_serve.batch import connect
from be_serve.client import BEClient
from be_serve.core.addresses import is_exposed, is_local, warn_of_clear_text
from be_serve.core.errors import BEError, InputError, ServerRefused
from be_serve.process import Server
from benchmarks.common.client import ServerClient
from trainer.data.chat_server import Endpoint

KEY = "hunter2-key"
MESSAGES = [{"role": "user", "content": "A secret prompt."}]
ANSWER = {"data": [], "choices": [{"message": {"content": "Ahoy"}}]}
LOCAL = ["127.0.0.1", "localhost", "LOCALHOST", "127.0.0.2", "0.0.0.0", "127.1", "2130706433"]


class Noted(ThreadingHTTPServer):
    """A server that notes each request's line, headers and body, and answers `status`."""

    daemon_threads = True

    def __init__(self, status: int = 200, **headers: str) -> None:
        self.seen: list[str] = []
        noted = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                noted.seen.append(f"{self.requestline}\n{self.headers}\n{body.decode()}")
                data = json.dumps(ANSWER).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_CONNECT = handle_any

            def log_message(self, *_: object) -> None:
                """Quiet."""

        super().__init__(("0.0.0.0", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}"


@pytest.fixture
def noted():
    """Start servers that take notes."""
    made: list[Noted] = []

    def start(status: int = 200, **headers: str) -> Noted:
        made.append(Noted(status, **headers))
        return made[-1]

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def proxy(noted, monkeypatch):
    """A proxy that the environment names in every way, and that notes what it gets."""
    server = noted()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, server.url())
        monkeypatch.setenv(name.lower(), server.url())
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BE_JUDGE_KEY", KEY)
    return server


async def by_admin_client(url: str) -> None:
    with BEClient(url, api_key=KEY, vllm_api_key=KEY) as client:
        client.list()


async def by_judge(url: str) -> None:
    Endpoint(url, "m", role="judge", key_variable="BE_JUDGE_KEY").chat(MESSAGES, {})


async def by_benchmark(url: str) -> None:
    async with ServerClient(url, api_key=KEY) as client:
        await client.call("POST", "/v1/chat/completions", json={"messages": MESSAGES}, headers={"X-BE-Key": KEY})


async def by_batch(url: str) -> None:
    async with connect(url, key=KEY) as client:
        await client.post("/v1/chat/completions", json={"messages": MESSAGES})


CLIENTS = [by_admin_client, by_judge, by_benchmark, by_batch]


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("ask", CLIENTS)
async def test_nothing_for_this_machine_goes_to_a_proxy(ask, host, noted, proxy):
    server = noted()
    await ask(server.url(host))
    assert KEY in "".join(server.seen)
    assert proxy.seen == []


@pytest.mark.parametrize(
    "url", ["http://[::1]:9", "http://model.localhost:9", "https://127.0.0.1:9", "https://[::ffff:127.0.0.1]:9"]
)
@pytest.mark.parametrize("ask", CLIENTS)
async def test_not_even_where_nobody_answers(ask, url, proxy):
    with pytest.raises(Exception, match=r"."):
        await ask(url)
    assert proxy.seen == []


@pytest.mark.parametrize(("ask", "by_proxy"), [*zip(CLIENTS, (True, True, False, False), strict=True)])
async def test_other_machines_are_reached_as_ever(ask, by_proxy, proxy):
    """By the environment's proxy, but for the batch and the benchmarks, which never used one."""
    try:
        await ask("http://model.invalid:8000")
    except Exception:
        assert not by_proxy
    assert bool(proxy.seen) == by_proxy
    proxy.seen.clear()
    with pytest.raises(Exception, match=r"."):  # this proxy opens no tunnel
        await ask("https://model.invalid")
    assert [line.split()[0] for line in proxy.seen] == (["CONNECT"] if by_proxy else [])
    assert KEY not in "".join(proxy.seen)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("ask", CLIENTS)
async def test_no_key_and_no_prompt_follows_a_redirect(ask, status, noted, monkeypatch):
    monkeypatch.setenv("BE_JUDGE_KEY", KEY)
    elsewhere = noted()
    server = noted(status, Location=f"{elsewhere.url('127.0.0.2')}/v1/x")
    with contextlib.suppress(BEError):
        await ask(server.url())
    assert len(server.seen) == 1
    assert elsewhere.seen == []


@pytest.mark.parametrize("ask", CLIENTS)
async def test_no_credentials_are_taken_from_netrc(ask, noted, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password netrc-word\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BE_JUDGE_KEY", raising=False)
    server = noted()
    await ask(server.url())
    assert "Basic" not in "".join(server.seen)


async def test_a_server_that_is_waited_for_is_asked_directly(noted, proxy):
    """The demo's, the benchmarks' and the trainer's: all are started by this class."""
    answering = noted()
    command, port = [sys.executable, "-c", "import time; time.sleep(60)"], answering.server_port
    async with Server("test", command, log=None, env=dict(os.environ), at=port, timeout=30):
        assert "/health" in "".join(answering.seen)
    assert proxy.seen == []


@pytest.mark.parametrize(
    "host", [*LOCAL, "::1", "[::1]", "a.b.localhost", "localhost.", "127.255.0.9", "::", "::ffff:127.0.0.1", "0x7f.1"]
)
def test_this_machine(host):
    assert is_local(host)


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "localhost.example.com",
        "127.0.0.1.example.com",
        "10.0.0.1",
        "notlocalhost",
        "",
        "128.0.0.1",
        "2001:db8::1",
    ],
)
def test_other_machines(host):
    assert not is_local(host)


@pytest.mark.parametrize("ask", CLIENTS)
async def test_a_key_in_clear_text_is_warned_of_once(ask, monkeypatch, capsys):
    monkeypatch.setenv("BE_JUDGE_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    warn_of_clear_text.cache_clear()
    for _ in range(2):
        with pytest.raises(Exception, match=r"."):
            await ask("http://model.invalid:8000")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "clear text" in said
    assert KEY not in said


@pytest.mark.parametrize(("ask", "by_proxy"), [*zip(CLIENTS, (True, True, False, False), strict=True)])
async def test_the_warning_names_the_proxy_that_reads_the_key(ask, by_proxy, monkeypatch, capsys):
    monkeypatch.setenv("BE_JUDGE_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:proxy-word@127.0.0.1:9")
    warn_of_clear_text.cache_clear()
    with pytest.raises(Exception, match=r"."):
        await ask("http://model.invalid:8000")
    said = capsys.readouterr().err
    assert ("127.0.0.1:9" in said) == by_proxy
    assert "proxy-word" not in said


def test_tls_and_this_machine_need_no_warning():
    assert not is_exposed("https", "example.com")
    assert not is_exposed("http", "127.0.0.1")


@pytest.mark.parametrize("key", ["hunter2\n", "hunter2\r\nX: y", 'hun"ter2\n'])
def test_a_key_that_no_header_can_carry_is_not_shown(key, monkeypatch):
    monkeypatch.setenv("BE_JUDGE_KEY", key)
    with pytest.raises(InputError) as caught, BEClient("http://127.0.0.1:9", api_key=key) as client:
        client.list()
    assert "ter2" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        Endpoint("http://127.0.0.1:9", "m", role="judge", key_variable="BE_JUDGE_KEY").chat(MESSAGES, {})
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:hun@ter2@127.0.0.1:9", "http://127.0.0.1:hunter2", "http://127.0.0.1:9/?key=hunter2"]
)
def test_a_url_with_a_secret_is_not_shown(url):
    with pytest.raises(InputError) as caught, BEClient(url, api_key="k") as client:
        client.list()
    assert "ter2" not in str(caught.value)
    with pytest.raises(InputError, match="BE_JUDGE_KEY") as caught:
        Endpoint(url, "m", role="judge", key_variable="BE_JUDGE_KEY")
    assert "ter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["schlüssel-hunter2", "hunter2\x00x", "a\nhunter2"])
def test_a_key_that_is_no_header_is_refused_at_once(key, monkeypatch):
    for keys in ({"api_key": key}, {"api_key": "k", "vllm_api_key": key}):
        with pytest.raises(InputError, match="Check --") as caught:
            BEClient("http://127.0.0.1:9", **keys)
        assert "hunter2" not in str(caught.value)
    monkeypatch.setattr(os, "environ", {**os.environ, "BE_JUDGE_KEY": key})
    with pytest.raises(InputError, match="Check BE_JUDGE_KEY") as caught:
        Endpoint("http://127.0.0.1:9", "m", role="judge", key_variable="BE_JUDGE_KEY")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("answer", [{}, [], {"data": None}, "hunter2-key"])
def test_an_answer_of_another_server_is_no_traceback(answer, noted, monkeypatch):
    monkeypatch.setitem(globals(), "ANSWER", answer)
    with BEClient(noted().url(), api_key=KEY) as client:
        for ask in (client.list, lambda: client.show("x")):
            with pytest.raises(ServerRefused, match="no answer of be-serve") as caught:
                ask()
            assert KEY not in str(caught.value)
