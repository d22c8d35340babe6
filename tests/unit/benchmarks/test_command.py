"""`be-serve bench ttft` as a process, against fake servers: output, exit status, Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.unit.benchmarks.fake import FakeServer


async def start(tmp_path: Path, ours: FakeServer, stock: FakeServer, *options: str) -> asyncio.subprocess.Process:
    arguments = ["bench", "ttft", "--model", "fake", "--url", ours.url, "--baseline-url", stock.url, "--be-id", "x"]
    arguments += ["--cases", "120:26", "--warmup", "1", "--pause", "0", "--out", str(tmp_path / "out"), *options]
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "be_serve.cli.main", *arguments],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "VLLM_API_KEY": "hidden-value"},
        # A shell starts what runs in its background deaf to SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--check",), 1)])
async def test_a_whole_run(tmp_path, options, status):
    async with FakeServer(plugin=True, tokens={"x": 1}) as ours, FakeServer() as stock:
        secret = ["--server-arg=--hf-token hidden-value", "--admin-key", "hidden-value"]
        ours.url = ours.url.replace("http://", "http://me:hidden-value@")
        process = await start(tmp_path, ours, stock, "--rounds", "2", *secret, *options)
        out, err = await process.communicate()
    assert process.returncode == status, err.decode()  # 1: the bounds at 1,584 tokens were not measured
    *table, last = out.decode().strip().splitlines()
    assert table[0].startswith("TTFT of fake on ")
    summary = json.loads(last)
    assert summary["rounds"] == 2
    assert set(summary["cases"]["120:26"]["p50_ttft_ms"]) == {
        "none", "floor_stock", "floor", "be", "full_warm", "full_cold",
    }  # fmt: skip
    assert Path(summary["png"]).stat().st_size > 1000
    result = Path(summary["json"]).read_text()
    assert "hidden-value" not in result + out.decode() + err.decode()
    assert json.loads(result)["passes_per_round"] == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_saves_what_was_measured(tmp_path, number):
    async with FakeServer(plugin=True, tokens={"x": 1}) as ours, FakeServer() as stock:
        process = await start(tmp_path, ours, stock, "--rounds", "30", "--close", "0")
        while len(stock.bodies) < 14:
            await asyncio.sleep(0.02)
            assert process.returncode is None
        process.send_signal(number)
        out, err = await process.communicate()
    assert process.returncode == 130, err.decode()
    summary = json.loads(out.decode().strip().splitlines()[-1])
    assert summary["interrupted"]
    assert 1 <= summary["rounds"] < 30
    assert Path(summary["json"]).exists()


async def test_a_refused_request_is_one_line(tmp_path):
    async with FakeServer(plugin=True) as ours, FakeServer() as stock:
        process = await start(tmp_path, ours, stock, "--rounds", "1")
        out, err = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    last = err.decode().strip().splitlines()[-1]
    assert last == "be-serve: Arm be of case 120:26 failed on the plugin server: HTTP 404: No token 'x'."
