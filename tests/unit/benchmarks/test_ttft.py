"""The whole benchmark against two fake servers whose cost per token is known."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shlex
import signal
from contextlib import asynccontextmanager

import pytest
from click.testing import CliRunner

from be_serve.cli.bench import command
from be_serve.core.errors import InputError, ServerError
from benchmarks.common.machine import hardware, versions
from benchmarks.common.servers import ServerOptions
from benchmarks.common.tokens import make_token
from benchmarks.ttft.chart import draw
from benchmarks.ttft.figures import analyse
from benchmarks.ttft.report import summary, table, write_json
from benchmarks.ttft.rounds import MAX_FAILURES
from benchmarks.ttft.run import TTFTOptions, max_model_len, measure_ttft, new_run, rest
from tests.unit.benchmarks.fake import MODEL, FakeServer

CASES = ((120, 26), (400, 30))
VLLM_FIELDS = """
    date backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration
    completed failed total_input_tokens total_output_tokens request_throughput output_throughput
    mean_ttft_ms median_ttft_ms std_ttft_ms p50_ttft_ms p90_ttft_ms p99_ttft_ms mean_e2el_ms p99_e2el_ms
    mean_tpot_ms mean_itl_ms ttfts itls input_lens output_lens start_times errors
"""


def make_options(tmp_path, **changes) -> TTFTOptions:
    values = {"model": MODEL, "out": tmp_path, "servers": ServerOptions(MODEL), "cases": CASES, "rounds": 4}
    return TTFTOptions(**{**values, "warmup": 1, "close": 0, "pause": 0.0, **changes})


@asynccontextmanager
async def two_servers(**plugin):
    async with FakeServer(plugin=True, **plugin) as ours, FakeServer() as stock:
        yield ours, stock


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("arms", [("floor", "be"), ("be", "full_cold")])
async def test_chosen_arms_alone_are_asked(tmp_path, tiny_model_dir, arms):
    async with two_servers() as (ours, stock):
        options = make_options(
            tmp_path,
            url=ours.url,
            baseline_url=stock.url,
            folder=tiny_model_dir,
            admin_key="secret",
            arms=arms,
            close=1,
        )
        run = await measure_ttft(options, silent)
    figures = analyse(run)
    draw(run, figures, tmp_path / "ttft.png")
    assert "ratio of medians" in table(run, figures)
    for case in figures["cases"]:
        assert set(case["arms"]) == set(arms)
        assert list(case["ratios"]) == ["be/floor" if "floor" in arms else "be/full_cold"]
        assert {name: arm["completed"] for name, arm in case["arms"].items()} == {
            "floor": {"floor": 8, "be": 8},
            "be": {"be": 8, "full_cold": 4},
        }[arms[0]]


async def test_arms_that_do_not_exist_are_refused(tmp_path):
    for arms, said in ((("be", "flor"), "flor"), (("floor",), "the arm be"), (("be", "floor_stock"), "floor_stock")):
        with pytest.raises(InputError, match=said):
            await measure_ttft(make_options(tmp_path, url="http://127.0.0.1:9", arms=arms), silent)


async def test_known_costs_come_back(tmp_path, tiny_model_dir):
    async with two_servers() as (ours, stock):
        options = make_options(
            tmp_path, url=ours.url, baseline_url=stock.url, folder=tiny_model_dir, admin_key="secret", k=2
        )
        run = await measure_ttft(options, silent)
        assert ours.deleted == list(ours.tokens) == [run.token["be_id"]]
    assert run.rounds_measured == 4
    assert run.notes == ["hardware and versions describe the client. The benchmark did not start the servers."]
    assert run.token["answers_as_its_text"] == {"120:26": True, "400:30": True}
    figures = analyse(run)
    assert figures["failed"] == 0
    assert figures["notes"] == []
    assert 0 < figures["round_trip_ms"] < 100
    # The fake's clock: 4 ms + .1 ms a token, and some time of the socket and the event loop.
    assert figures["fit"]["beta_ms_per_token"] == pytest.approx(0.1, rel=0.35)
    for case, prompt in zip(figures["cases"], (120, 400), strict=True):
        arms = case["arms"]
        assert list(arms) == ["none", "floor_stock", "floor", "be", "full_warm", "full_cold"]
        assert arms["be"]["input_lens"] == arms["floor"]["input_lens"]
        assert arms["full_cold"]["input_lens"][0] - arms["none"]["input_lens"][0] == prompt
        assert arms["full_cold"]["cached_tokens"] is None
        assert arms["full_warm"]["cached_tokens"] >= prompt - 16
        assert case["ratios"]["be/full_cold"]["of_medians"] < 1
        assert case["model"]["norm_flops"] == pytest.approx(
            (2 + case["question_tokens"]) / (prompt + case["question_tokens"])
        )
    salts = [b["cache_salt"] for b in stock.bodies]
    assert len(set(salts)) == len(salts) - 2 * (5 - 1)  # one shared salt a case, in 5 rounds
    questions = [b["messages"][-1]["content"] for b in ours.bodies]
    assert len(set(questions)) == 2 * 5  # every round of every case has its own


async def test_order_differs_between_rounds_and_follows_from_the_seed(tmp_path):
    orders = []
    for _ in range(2):
        async with two_servers(tokens={"x": 1}) as (ours, stock):
            run = await measure_ttft(make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x"), silent)
        started = [(s.started, r, key) for key, all_rounds in run.samples.items() for r, s in all_rounds.items()]
        orders.append([(r, key) for _, r, key in sorted(started)])
    assert orders[0] == orders[1]
    rounds = [tuple(key for r, key in orders[0] if r == number) for number in range(4)]
    assert len(set(rounds)) == 4
    assert all(len({case for case, _ in order[:6]}) == 1 for order in rounds)  # a case's arms stand together


async def test_close_arms_have_passes_of_their_own(tmp_path):
    async with two_servers(tokens={"x": 1}) as (ours, stock):
        options = make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x", rounds=2, close=2)
        run = await measure_ttft(options, silent)
    counts = {key[1]: len(samples) for key, samples in run.samples.items()}
    assert counts == {"none": 2, "floor_stock": 2, "floor": 6, "be": 6, "full_warm": 2, "full_cold": 2}
    assert run.rounds_measured == 2
    ratios = analyse(run)["cases"][0]["ratios"]
    assert {name: ratio["pairs"] for name, ratio in ratios.items()} == {
        "be/full_cold": 2, "be/full_warm": 2, "be/floor": 6, "floor/floor_stock": 2,
    }  # fmt: skip
    asked = [(b["cache_salt"], b["messages"][-1]["content"]) for b in ours.bodies]
    assert len({question for _, question in asked}) == 2 * (1 + 2 * 3)  # a new one in every pass


async def test_one_server_alone_says_so(tmp_path):
    async with FakeServer(plugin=True, tokens={"x": 1}) as ours:
        run = await measure_ttft(make_options(tmp_path, url=ours.url, be_id="x", rounds=2), silent)
        assert all(("be_id" in b) != (b.get("be_match") is False) for b in ours.bodies)
    figures = analyse(run)
    assert "floor/floor_stock" not in figures["cases"][0]["ratios"]
    assert any("plugin server" in note for note in run.notes)


async def test_a_wrong_size_is_noted(tmp_path):
    async with FakeServer(plugin=True, tokens={"x": 4}) as ours:
        run = await measure_ttft(make_options(tmp_path, url=ours.url, be_id="x", rounds=1), silent)
    assert any("arm be of case 120:26 has" in note for note in run.notes)


async def test_own_prompt(tmp_path):
    prompt = "Answer as a pirate. " * 20
    async with FakeServer(plugin=True, tokens={"x": 1}) as ours:
        options = make_options(tmp_path, url=ours.url, be_id="x", rounds=1, prompt=prompt.strip(), cases=((0, 30),))
        run = await measure_ttft(options, silent)
        assert run.cases[0].prompt_tokens > 50
        assert any(b["messages"][0]["content"] == prompt.strip() for b in ours.bodies)


async def test_what_stops_before_the_rounds(tmp_path, tiny_model_dir):
    async with two_servers() as (ours, stock):
        options = make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="unknown")
        with pytest.raises(ServerError, match=r"Arm be of case 120:26 failed .* HTTP 404: No token 'unknown'"):
            await measure_ttft(options, silent)
        options = make_options(tmp_path, url=ours.url, folder=tiny_model_dir)
        with pytest.raises(InputError, match="--be-id"):
            await measure_ttft(options, silent)
        options = make_options(tmp_path, url=ours.url, folder=tiny_model_dir, admin_key="wrong")
        with pytest.raises(ServerError, match="403: The admin key is missing or wrong"):
            await measure_ttft(options, silent)
    with pytest.raises(ServerError, match="No server answers"):
        await measure_ttft(make_options(tmp_path, url="http://127.0.0.1:9", be_id="x"), silent)


async def test_failed_requests_are_counted_and_left_out_of_pairs(tmp_path, capsys):
    async with two_servers(tokens={"x": 1}, fail={7: (500, "out of memory")}) as (ours, stock):
        run = await measure_ttft(make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x"), silent)
    figures = analyse(run)
    assert figures["failed"] == 1
    assert "HTTP 500: out of memory" in capsys.readouterr().err
    pairs = [case["ratios"]["be/floor"]["pairs"] for case in figures["cases"]]
    assert sorted(pairs) == [3, 4]
    errors = [e for case in figures["cases"] for arm in case["arms"].values() for e in arm["errors"] if e]
    assert errors == ["HTTP 500: out of memory"]


async def test_a_dead_server_ends_the_run_with_its_samples(tmp_path):
    async with two_servers(tokens={"x": 1}, fail_from=10) as (ours, stock):
        options = make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x", rounds=12)
        run = await measure_ttft(options, silent)
    assert f"failed {MAX_FAILURES} times in a row" in run.stopped
    assert analyse(run)["failed"] == MAX_FAILURES
    assert 0 < run.rounds_measured < 10


async def test_interruption_keeps_what_was_measured(tmp_path):
    async with two_servers(tokens={"x": 1}) as (ours, stock):
        options = make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x", rounds=25)
        task = asyncio.create_task(measure_ttft(options, silent))
        while len(stock.bodies) < 40:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        run = await task
    assert run.interrupted
    assert 0 < run.rounds_measured < run.rounds
    assert "interrupted, 25 rounds requested" in table(run, analyse(run))


@pytest.fixture
async def small_run(tmp_path):
    async with two_servers(tokens={"x": 1}) as (ours, stock):
        yield await measure_ttft(make_options(tmp_path, url=ours.url, baseline_url=stock.url, be_id="x"), silent)


async def test_report(small_run, tmp_path):
    figures = analyse(small_run)
    text = table(small_run, figures)
    assert "NormFLOPs 0.185" in text  # (1 + 26) / (120 + 26)
    assert "----  [BE] / full prompt cold at 1584:* tokens: not measured (bound 0.15)" in text
    assert text.count("[BE] / k-token prompt, upper end of the interval at") == 2
    write_json(small_run, figures, tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    arm = data["cases"][0]["arms"]["be"]
    assert set(VLLM_FIELDS.split()) <= set(arm)
    assert len(arm["ttfts"]) == arm["num_prompts"] == arm["completed"] == 4
    assert {"hardware", "versions", "servers", "seed", "command", "settings"} <= set(data)
    line = summary(small_run, figures, json_path=tmp_path / "r.json", png_path=None)
    assert "\n" not in line
    assert set(json.loads(line)["cases"]) == {"120:26", "400:30"}
    draw(small_run, figures, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


async def test_verdicts_of_the_bounds(small_run):
    case = small_run.cases[1]
    object.__setattr__(case, "prompt_tokens", 1584)
    small_run.samples = {(case.name, key[1]): rounds for key, rounds in small_run.samples.items() if key[0] == "400:30"}
    for arm, seconds in {"be": 0.1, "floor": 0.1, "full_cold": 1.0, "full_warm": 0.12}.items():
        for sample in small_run.samples[case.name, arm].values():
            sample.ttft = seconds
    small_run.cases = [case]
    verdicts = analyse(small_run)["verdicts"]
    assert [(v["value"], v["pass"]) for v in verdicts] == [
        (pytest.approx(0.1), True),
        (pytest.approx(0.1 / 0.12), False),
        (pytest.approx(1.0), True),
    ]


async def test_what_the_cache_says_against_an_arm(small_run):
    key = small_run.cases[0].name
    for sample in small_run.samples[key, "full_warm"].values():
        sample.cached_tokens = 16
    for sample in small_run.samples[key, "be"].values():
        sample.cached_tokens = 32
    notes = analyse(small_run)["notes"]
    assert len(notes) == 2
    assert "be of case 120:26 found 32 tokens" in notes[0]
    assert "full_warm of case 120:26 found only 16" in notes[1]


def test_rest_between_servers_of_one_host(tmp_path):
    def seconds(**changes):
        return rest(make_options(tmp_path, **{"pause": None, **changes}))

    assert seconds() == 0  # our own are suspended
    assert seconds(url="http://a:1") == 0
    assert seconds(url="http://a:1", baseline_url="http://b:1") == 0
    assert seconds(url="http://a:1", baseline_url="http://a:2/v1") > 1
    assert seconds(url="http://a:1", baseline_url="http://a:2", pause=0.5) == 0.5


async def test_the_rest_is_taken_where_the_server_changes(tmp_path):
    async with two_servers(tokens={"x": 1}) as (ours, stock):
        options = make_options(
            tmp_path, url=ours.url, baseline_url=stock.url, be_id="x", cases=CASES[:1], rounds=1, pause=0.2
        )
        run = await measure_ttft(options, silent)
    samples = sorted(((s.started, s.e2e, key[1]) for key, passes in run.samples.items() for s in passes.values()))
    servers = {arm.name: arm.server for arm in run.arms}
    gaps = [(b[0] - a[0] - a[1], servers[a[2]] != servers[b[2]]) for a, b in itertools.pairwise(samples)]
    assert all(gap >= 0.2 for gap, changed in gaps if changed)
    assert any(gap < 0.2 for gap, changed in gaps if not changed)


def test_max_model_len(tmp_path):
    assert max_model_len(make_options(tmp_path, cases=((1584, 58),))) % 128 == 0
    assert max_model_len(make_options(tmp_path, cases=((1584, 58),))) >= 1584 + 58 + 1 + 2 + 64
    assert max_model_len(make_options(tmp_path, prompt="word " * 1000, cases=((0, 58),))) >= 2500 + 58


def test_where_it_was_measured():
    assert hardware()["cores"] >= 1
    assert "python" in versions()


def test_the_settings_in_a_result_hold_no_secret(tmp_path, monkeypatch):
    flags = ("--hf-token", "hunter2", "--additional-config", '{"api_key": "hunter2"}', "--port", "1")
    command = ["be-serve", "bench", "ttft", "--api-key", "hunter2", f"--server-arg={shlex.join(flags)}"]
    monkeypatch.setattr("sys.argv", command)
    options = make_options(
        tmp_path,
        url="http://me:hunter2@host:8000/v1",
        baseline_url="http://host:8001/v1?api_key=hunter2",
        admin_key="hunter2",
        api_key="hunter2",
        servers=ServerOptions("m", flags, ("--be-admin-key=hunter2",)),
    )
    run = new_run(options)
    assert "hunter2" not in f"{run.command} {run.settings}"
    assert run.settings["url"] == "http://***@host:8000/v1"
    assert run.settings["server_args"][-2:] == ["--port", "1"]


def test_the_token_for_a_server_of_ours_names_its_model(tiny_model_dir):
    assert make_token(tiny_model_dir, MODEL, None, [1], "x").manifest.base_model.name == MODEL


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline-url", "http://x"], "--baseline-url needs --url"),
        (["--be-id", "x"], "--be-id names a token of the server at --url"),
        (["--cases", "12"], "not PROMPT:QUESTION"),
        (["--cases", "12:3,12:3"], "the same case twice"),
        (["--cases", "0:3"], "not PROMPT:QUESTION"),
        (["--prompt-file", "p.txt", "--cases", "1:2"], "with --question-tokens, not with --cases"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    result = CliRunner().invoke(command, ["ttft", *arguments])
    assert result.exit_code == 2
    assert message in result.output
