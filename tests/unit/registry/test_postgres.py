"""What PostgreSQL itself says of a wrong password or database, and what of it reaches a message."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import traceback
from pathlib import Path

import pytest

from be_serve.core.errors import RegistryError
from be_serve.registry import Registry
from tests.factories import make_token

PASSWORD = "hun@ter:2/?#%"
ENCODED = "hun%40ter:2%2F?#%25"
NOBODY = 65534

# Debian keeps these two programs out of PATH.
PATH = os.pathsep.join([os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
pytestmark = pytest.mark.skipif(
    shutil.which("initdb", path=PATH) is None or shutil.which("pg_ctl", path=PATH) is None,
    reason="PostgreSQL's programs are not installed (Debian: apt install postgresql)",
)


@pytest.fixture(scope="module")
def server():
    """A server with a password, as `host:port`; PostgreSQL refuses to run as root."""
    user = {"user": NOBODY, "group": NOBODY} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="be-pg-") as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        os.chmod(folder, 0o755)
        if user:
            os.chown(folder, NOBODY, NOBODY)

        def run(*words: str) -> None:
            program = str(shutil.which(words[0], path=PATH))
            command = [program, *words[1:]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, env={"PATH": PATH}, **user)

        def control(*words: str) -> None:
            run("pg_ctl", "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", *words)

        run(
            "initdb",
            "-D",
            f"{folder}/data",
            "-U",
            "owner",
            "-E",
            "UTF8",
            "-A",
            "scram-sha-256",
            f"--pwfile={folder}/password",
        )
        probe.close()
        control("-o", f"-p {port} -k {folder} -h 127.0.0.1", "start")
        try:
            yield f"127.0.0.1:{port}"
        finally:
            control("-m", "immediate", "stop")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://owner:wr%40ng@{}/postgres",
        "postgresql+psycopg://owner:wr@ng@{}/postgres",
        "postgresql+psycopg://owner:wr/?#%ng@{}/postgres",
        "postgresql+psycopg://wr%40ng:x@{}/postgres",
        "postgresql+psycopg://{}/postgres?user=owner&password=wr%40ng",
        "postgresql+psycopg://{}/postgres?user=owner&password=wr&ng=x",
        f"postgresql+psycopg://owner:{ENCODED}@{{}}/absent",
        f"postgresql+psycopg://owner:{ENCODED}@{{}}/postgres?sslmode=require",
    ],
)
def test_no_message_shows_a_part_of_the_password(server, url):
    with pytest.raises(RegistryError) as caught:
        Registry(url.format(server))
    told = f"{caught.value} {''.join(traceback.format_exception(caught.value))}".replace(server, "")
    for part in ("wr@", "wr%", "wr/", "ng@", '"ng"', "40ng", "hun", "ter:2"):
        assert part not in told
    assert "owner:" not in told


def test_a_password_with_every_special_letter_works(server):
    registry = Registry(f"postgresql+psycopg://owner:{ENCODED}@{server}/postgres")
    assert registry.put(make_token().to_bytes()).created
    registry.close()
