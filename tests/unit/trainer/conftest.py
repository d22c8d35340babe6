"""A folder with a prompt and queries, and `train` in it on a tiny model."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.unit.trainer.commands import PROMPT, TEXTS, be_serve


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captain.txt").write_text(PROMPT)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": text}) + "\n" for text in TEXTS))
    return tmp_path


@pytest.fixture
def train(here, tiny_model_dir):
    def run(*args):
        fixed = ["--dtype", "float32", "--response-tokens", 4, "--steps", 3, "--batch-size", 2]
        fixed += ["--answer-tokens", 8]
        return be_serve("train", "captain.txt", "--model", tiny_model_dir, *fixed, *args)

    return run


@pytest.fixture
def chat_server():
    """Start a server whose chat completions are scripted by a function of the request's body.

    It gives the answer's text, `(text, finish_reason)`, or a status. Returns the URL, and what is asked, with the key.
    """
    servers = []

    def start(answer):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append({"key": self.headers["Authorization"], **body})
                found = answer(body)
                text, reason = found if isinstance(found, tuple) else (found, "stop")
                data = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": reason}]}).encode()
                self.send_response(text if isinstance(text, int) else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
