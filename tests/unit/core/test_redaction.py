"""Secrets out of command lines, URLs, environments and texts: by cases, and by secrets planted anywhere."""

from __future__ import annotations

import json
import shlex
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from be_serve.core.redaction import (
    MASK,
    credentials_in,
    hide,
    holds_credentials,
    names_a_secret,
    redact,
    redact_environment,
    redact_word,
    safe_url,
    secrets_of,
)

SECRET_NAMES = """
    api-key admin-key be-admin-key vllm-api-key hf-token HF_TOKEN hf_token github-token access_token accessToken
    AWS_SECRET_ACCESS_KEY s3-access-key-id s3-secret-access-key ssl-keyfile-password password sslpassword PGPASSWORD
    passwd secret client_secret api_keys auth.bearer additional-config.api_key X-BE-Key Authorization pass%77ord
""".split()  # noqa: SIM905
INNOCENT_NAMES = """
    tokens max-tokens question-tokens be-token tokenizer tokenizer-mode be-admin-key-file ssl-keyfile ssl-certfile
    eos_token image_token_id num_key_value_heads max-num-batched-tokens long-prefill-token-threshold spec-tokens
    allow-credentials pass_config sort_key model port seed VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE VLLM_HOST_IP
""".split()  # noqa: SIM905
INNOCENT_LINES = [
    "be-serve bench ttft --model m --url http://127.0.0.1:8000/v1 --k 1 --cases 1584:58,337:26 --token t.safetensors",
    "serve m --be-token captain=captain.safetensors --be-token=api-key=t.safetensors --be-registry sqlite:////a@b/r.db",
    "serve m --tokens 4 --max-tokens 5 --question-tokens 6 --tokenizer x --be-admin-key-file /run/key --ssl-keyfile /k",
    "serve m --allow-credentials --port 8000 --be-registry postgresql+psycopg://db.example:5432/registry",
    "train p.txt --model builtin:smollm2-135m-instruct --init text:Ahoy --teacher-url https://host.example/v1?v=2#x",
]
INNOCENT_WORDS = [
    "You are a pirate. Don't say 'no'.",
    "See http://example.com for more, and be kind.",
    '{"be_rows": 1024, "rope": {"theta": 1e4}, "eos_token": "</s>", "list": [1, "a"]}',
    "--enforce-eager --dtype float32",
    "*.localhost",
    "-",
    "",
]
URLS = ["postgresql://{}@db.example:5432/registry", "http://{}@host/v1", "postgresql+psycopg://{}@[::1]/db?a=b"]
# Characters that break URLs, JSON, shells or options, and letters enough that a secret is not found by chance.
SECRETS = st.text(
    st.sampled_from(string.ascii_letters + string.digits + "@/:#?%&;=,.+-_~$'\"\\ {}[]\t<>ß"), max_size=12
)


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name):
    assert names_a_secret(name)


@pytest.mark.parametrize("name", INNOCENT_NAMES)
def test_names_of_other_things(name):
    assert not names_a_secret(name)


@pytest.mark.parametrize("line", INNOCENT_LINES)
def test_innocent_lines_stay(line):
    assert redact(line.split()) == line.split()


@pytest.mark.parametrize("word", INNOCENT_WORDS)
def test_innocent_words_stay(word):
    assert redact(["--summary", word, f"--x={word}"]) == ["--summary", word, f"--x={word}"]
    assert not holds_credentials(word)


@given(st.lists(st.text(string.ascii_lowercase + string.digits + " ._/", max_size=20)))
def test_words_without_names_and_urls_stay(words):
    assert redact(words) == words


def _plants(name: str, secret: str) -> list[list[str]]:
    """Command lines that hold the secret under a secret's name."""
    as_json = json.dumps({"deep": [{"x": 1}, {name: secret}]})
    return [
        [f"--{name}", secret, "--port", "8"],
        [f"--{name}={secret}"],
        [f"--{name}", "a first value", secret],
        ["env", f"{name}={secret}", "x"],
        ["-H", f"{name}: {secret}"],
        ["--header", f"{name}:{secret}"],
        ["--additional-config", as_json],
        [f"--hf-overrides={as_json}"],
        ["--hf-overrides", json.dumps({name: [secret, {"x": secret}]})],
        ["--hf-overrides", json.dumps({name: {"x": secret}})],
        ["--hf-overrides", json.dumps({"inside": as_json})],
        ["--hf-overrides", f'{{"x": {{"{name}": {json.dumps(secret)}}}, "x": 1}}'],
        ["--model-loader-extra-config", f"{{'{name}': {secret!r}}}"],
        [f"--server-arg=--{name} {shlex.quote(secret)}"],
        ["--server-arg", f"--port 1 --{name}={shlex.quote(secret)} --k 1"],
        ["--server-arg", shlex.join(["--hf-overrides", as_json])],
        [f"http://h/x?a=b&{name}={secret}"],
        [f"--url=http://h/x?{name}={secret}"],
        ["--opts", f"a=1,{name}={secret}"],
    ]


def _planted(secret: str) -> str:
    """A secret as text that cannot stand in the innocent rest by chance."""
    return f"s3cr{secret}Wd"


@settings(max_examples=300, deadline=None)
@given(SECRETS, st.sampled_from([n for n in SECRET_NAMES if "%" not in n]))
def test_no_secret_behind_a_name_survives(text, name):
    secret = _planted(text)
    for words in _plants(name, secret):
        shown = redact(words)
        assert len(shown) == len(words)
        _gone(secret, " ".join(shown), words)


@settings(max_examples=500, deadline=None)
@given(SECRETS, SECRETS, st.sampled_from(URLS))
def test_no_user_info_survives_in_any_word(user, text, url):
    secret = _planted(text)
    for given_url in (url.format(f"{user}:{secret}"), url.format(f":{secret}"), url.format(secret)):
        for words in (
            [given_url],
            ["--be-registry", given_url],
            [f"--be-registry={given_url}"],
            [f"BE_REGISTRY={given_url}"],
            ["--hf-overrides", json.dumps({"x": [given_url]})],
        ):
            _gone(secret, " ".join(redact(words)), words)
        _gone(secret, safe_url(given_url), given_url)
        _gone(secret, hide(f'connection to "{given_url}" failed', credentials_in(given_url)), given_url)


@settings(max_examples=300, deadline=None)
@given(SECRETS, st.sampled_from(["password", "sslpassword", "api_key", "pass%77ord", "X-Amz-Signature"]))
def test_no_parameter_of_a_url_survives(text, name):
    secret = _planted(text)
    url = f"postgresql://host/db?a=b&{name}={secret}"
    _gone(secret, safe_url(url), url)
    _gone(secret, redact_word(url), url)
    _gone(secret, hide(f"{url} failed", credentials_in(url)), url)


def _gone(secret: str, shown: str, planted: object) -> None:
    """No part of the secret is left that tells anything: neither its beginning nor its end."""
    assert "s3cr" not in shown, (planted, shown)
    assert "Wd" not in shown, (planted, shown)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://user:p@ss@host:5/db?x=1", "postgresql://***@host:5/db"),
        ("postgresql://user:p/a@host/db", "postgresql://***@host/db"),
        ("postgresql://user:p#a@host/db", "postgresql://***@host/db"),
        ("postgresql://user:p?a@host/db", "postgresql://***"),
        ("postgresql://user:p%40ss@a:1,b:2/db", "postgresql://***@a:1,b:2/db"),
        ("postgresql:///user:pw@host/db", "postgresql://***@host/db"),
        ("postgresql://host:pw/db", "postgresql://***/db"),
        ("postgresql://host/db?password=a@b", "postgresql://***"),
        ("user:pw@host/db", "***@host/db"),
        ("postgresql:/user:pw@host/db", "***@host/db"),
        ("sqlite:////folder@home/r.db?key=1", "sqlite:////folder@home/r.db"),
        ("sqlite+pysqlcipher://:pw@/r.db", "sqlite+pysqlcipher://***@/r.db"),
        ("http://host:8000/v1", "http://host:8000/v1"),
    ],
)
def test_urls_for_messages(url, shown):
    assert safe_url(url) == shown


def test_options_of_every_kind():
    assert redact(["--api-key", "a", "b", "--port", "1"]) == ["--api-key", MASK, MASK, "--port", "1"]
    assert redact(["--hf-token", "--port", "8"]) == ["--hf-token", MASK, "8"]
    assert redact(["--admin-key", "-begins-with-a-dash"])[1] == MASK
    assert redact(["--hf-token", "--api-key", "s", "t"]) == ["--hf-token", MASK, MASK, MASK]
    assert redact(["--token", "hub-key", "--token=hub-key"]) == ["--token", MASK, f"--token={MASK}"]
    assert redact(["--hf-t", "s", "--api-k=s", "--ssl-keyfile-p", "s"]) == [
        *("--hf-t", MASK, f"--api-k={MASK}", "--ssl-keyfile-p", MASK)
    ]
    assert redact(["--api-key s3cret"]) == [f"--api-key {MASK}"]
    assert redact(["hf_abcdefghijklmnop", "Bearer abcdef"]) == [MASK, MASK]


@pytest.mark.parametrize("text", ["a", "a:", "a://", "a@", "x=y ", "{", "[", "http://u:p@", "'", '"a":', "-a=b "])
def test_long_words_take_no_time_and_end_nowhere(text):
    word = text * 4000
    assert isinstance(redact([word, f"--x={word}"])[0] + hide(word) + safe_url(word), str)


SIZE = 200_000
LONG_TEXTS = {
    "users": "x:" * (SIZE // 2) + " @",
    "JSON": json.dumps({"ids": [*range(SIZE // 7)], "u": "a@b"}),
    "a user": "a" * SIZE + "@",
    "no schemes": "://" * (SIZE // 3),
    "addresses": "a:b@" * (SIZE // 4),
    "signs": "x:" + "@" * SIZE + " ",
    "URLs": "http:// " * (SIZE // 8),
    "dots": "a." * (SIZE // 2) + "@",
    "open lists": "password=[, " * (SIZE // 12),
    "open quotes": "pwd='" + "\\'" * (SIZE // 2),
    "heads of JWTs": "eyJaaaaaaaa-" * (SIZE // 12),
    "options": "--server-arg " * (SIZE // 13),
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS.keys())
def test_the_time_is_linear_in_the_text(text):
    """A hostile server chooses the text of an error, and a prompt may stand in a request."""
    for function in (
        hide,
        safe_url,
        redact_word,
        names_a_secret,
        holds_credentials,
        credentials_in,
        lambda long: redact([long]),
        lambda long: redact(long.split(" ")),
        lambda long: redact_environment({"A": long}),
        lambda long: secrets_of(["x", long], {}),
    ):
        start = time.process_time()
        function(text)
        assert time.process_time() - start < 2.0  # quadratic, it is a minute


@pytest.mark.parametrize("option", ["--server-arg", "--plugin-arg", "--quality-arg"])
def test_values_of_an_option_that_passes_them_on_are_one_command_line(option):
    for words in (
        [option, "--api-key", option, "hunter2secret", "--k", "4"],
        [f"{option}=--api-key", f"{option}=hunter2secret", "--k", "4"],
        [option, "--api-key one", "--rounds", "3", f"{option}=hunter2secret", "--k", "4"],
    ):
        shown = redact(words)
        assert len(shown) == len(words)
        assert "hunter2" not in " ".join(shown)
        assert shown[-2:] == ["--k", "4"]
    assert redact([option, "--api-key", option, "s3"]) == [option, "--api-key", option, MASK]
    innocent = [option, "--max-model-len 9", option, "--dtype", f"{option}=float32", option]
    assert redact(innocent) == innocent


def test_an_option_of_the_plugin_server_follows_those_of_both():
    words = ["--plugin-arg", "hunter2", "--server-arg", "--dtype float32 --api-key"]
    assert redact(words)[1] == MASK


@pytest.mark.parametrize(
    "text",
    [
        r"pwd='a\'hunter2' x",
        r'password="a\"hunter2" x',
        "password='a hunter2",
        "api_key=['a', 'hunter2",
        "args=['x', 'api_key=hunter2']",
        'cause="password=hunter2"',
    ],
)
def test_a_quoted_secret_is_hidden_to_its_end(text):
    assert "hunter2" not in hide(text)


def test_a_relative_sqlite_path_with_a_user_is_hidden():
    assert "pw" not in safe_url("sqlite:///x:pw@h/d")
    assert redact(["--be-registry", "sqlite:///x:pw@h/d"]) == ["--be-registry", f"sqlite://{MASK}@h/d"]


def test_an_environment_without_its_secrets():
    env = {"HF_TOKEN": "s", "A": "http://u:p@h", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE": "4", "VLLM_API_KEY": "s"}
    assert redact_environment(env) == {"A": "http://***@h", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE": "4"}


def test_texts_lose_what_was_known_and_what_is_told_by_its_name():
    text = "log: api_key='word', {'hf_token': ['word']}, Authorization: Bearer word; known-word, http://u:word@h/x."
    assert "word" not in hide(text, ["known-word"])
    innocent = "The registry sqlite:///r.db failed: no such table (token 'harbor', port=8000). See http://h/x."
    assert hide(innocent, ["e"]) == innocent  # a known secret of a letter is no reason to blacken every word


def test_what_a_process_was_given():
    command = ["serve", "--api-key", "first-key", "second-key", "--hf-token=third-key", "--x", "http://u:fourth@h/"]
    found = secrets_of(command, {"BE_ADMIN_KEY": "fifth-key", "HOME": "/home/me"})
    assert {"first-key", "second-key", "third-key", "fourth", "fifth-key"} <= found
    assert "/home/me" not in found


def test_the_working_folder_is_no_secret():
    """A shell keeps it in PWD; paths in the tail of a log are what its reader needs."""
    env = {"PWD": "/home/me/project", "DB_PWD": "hunter2-of-the-database"}
    assert secrets_of(["serve", "--port", "1"], env) == {"hunter2-of-the-database"}
