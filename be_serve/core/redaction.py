"""Hides secrets in command lines, URLs, environments and error texts before they are displayed or stored.

A function finds a secret by the name before it (`--api-key X`, `HF_TOKEN=X`, `"password": "X"`), by its
place in a URL, or by its form. In doubt it hides too much. It does not find a secret without a name,
such as the last part of a webhook's path.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote, unquote_plus

MASK = "***"

_WORD_BORDER = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
_SECRET_INSIDE = ("password", "passwd", "passphrase", "passcode", "secret", "credential", "authorization", "apikey")
_SECRET_ENDS = frozenset({"pass", "pwd", "pw", "auth", "bearer", "jwt", "pat", "sig", "signature", "cookie"})
_NO_SECRET_ENDS = frozenset({"file", "path", "dir", "folder", "mode", "type", "name", "env", "length", "size", "count"})
_SWITCHES = frozenset({"allow", "enable", "disable", "no", "require", "verify", "skip"})
"""First words of options that take no value, such as `--allow-credentials`."""
_HARMLESS_KEYS = frozenset({"sort", "cache", "group", "primary", "public", "foreign", "partition", "query", "num"})
_VOCABULARY = frozenset({
    "be", "bos", "eos", "pad", "unk", "sep", "cls", "mask", "image", "video",
    "audio", "boi", "eoi", "boa", "eoa", "start", "stop", "end",
    "begin", "special", "prefix", "suffix", "middle", "separator", "per", "dummy", "placeholder", "think",
})  # fmt: skip
"""Words before `token` for a token of text or a be-serve token. Such a name holds no secret."""
_TOKEN_HOLDERS = frozenset({"api", "access", "auth", "hf", "hub", "bearer", "refresh", "github", "admin"})
_ABBREVIATED = ("api-key", "hf-token", "ssl-keyfile-password")
"""Options of vLLM that users may abbreviate: argparse accepts the beginning of a name if it fits one option only."""

_URL = re.compile(r"([A-Za-z0-9+._-]{0,40})://")
_URL_IN_TEXT = re.compile(rf"{_URL.pattern}\S*")
# The lookbehind makes a search begin only where a user's name may begin: it keeps the time linear in the text.
_BARE_USER = re.compile(r"(?<![^:/@='\"])[^:/@='\"]+:(?!//)(?=[^@])")
_WORD = re.compile(r"\S+")
_HOST = r"(?:\[[\w:.%]*\]|[\w.*-]*)(?::(?:\d{1,4}|[1-5]\d{4}|6[0-5]\d{3})?)?"
_HOSTS = re.compile(f"{_HOST}(?:,{_HOST})*")
_PAIR = re.compile(r"(?<![\w.%+-])([\w.%+-]+)(['\"]?\s*(?:=|:(?!//))\s*)(?=\S)")
_NAME_IN_TEXT = re.compile(r"(?<![\w.%+-])([\w.%+-]+)(?:\s*=\s*|['\"]\s*[:=]\s*)")
_VALUE_IN_TEXT = re.compile(
    r"\"[^\"\\]*(?:\\(?s:.)[^\"\\]*)*\"|'[^'\\]*(?:\\(?s:.)[^'\\]*)*'|\[[^\]]*\]"
    r"|[\"'\[].*"  # its end is missing: hide the rest of the line
    r"|[^\s,;&)}\]]+"
)
_HEADER = re.compile(r"(?i)\b(authorization|x-be-key|x-api-key|cookie)(['\"]?\s*[:=]\s*)(\S.*)")
_SHAPES = re.compile(
    r"(?i:\bbearer\s+)[^\s'\",;]{4,}|\b(?:hf_|sk-|gh[pousr]_|github_pat_|xox[a-z]-|glpat-)[\w-]{10,}|\bAKIA[0-9A-Z]{12,}"
    r"|(?<=Illegal header value )\S.*"  # h11's error for a key that contains a line end
    r"|\beyJ[\w-]{8,2048}\.[\w-]+\.[\w-]*"  # the limit keeps the time linear in the text
)
_AFTER_URL = ".,;:!?)>]}'\"`"
_AFTER_URL_IN_WORD = re.compile(r"[\s'\"<>]")
_FILES = ("sqlite", "file", "unix", "ipc")
_SEPARATORS = re.compile(r"[\s@/:?#&=;,'\"\\]+")
_PASSED_ON = (("--server-arg", "--plugin-arg"), ("--quality-arg",))
"""Options of the benchmarks whose values together are another program's command line, in this order."""
_REPLACED_ANYWHERE = 4
"""From this length on, a known secret is also replaced inside longer words."""


@functools.lru_cache(maxsize=1024)  # a text may hold one name a hundred thousand times
def names_a_secret(name: str) -> bool:
    """Whether an option, variable, parameter or JSON key with this name holds a secret.

    `--hf-token`, `api_key`, `sslpassword` and `accessToken` do; `--max-tokens`, `eos_token` and
    `--be-admin-key-file` do not.
    """
    words = [word.lower() for word in _WORD_BORDER.split(unquote_plus(name)) if word]
    if not words or words[-1] in _NO_SECRET_ENDS or words[0] in _SWITCHES:
        return False
    last, before = words[-1], words[-2] if len(words) > 1 else ""
    if any(secret in joined for joined in (" ".join(words), "".join(words)) for secret in _SECRET_INSIDE):
        return True
    if last in _SECRET_ENDS or "access_key" in "_".join(words):
        return True
    if last.endswith(("key", "keys")):
        return before not in _HARMLESS_KEYS
    if last.endswith("token"):
        return (last.removesuffix("token") or before) not in _VOCABULARY
    return last.endswith("tokens") and (last.removesuffix("tokens") or before) in _TOKEN_HOLDERS


def redact(command: Iterable[str]) -> list[str]:
    """A command line with its secrets hidden. Words without a secret are not changed.

    After an option that names a secret, the next word is always hidden, and then all words up to
    the next option, because vLLM's `--api-key` takes several values.
    The values of `--server-arg`, `--plugin-arg` and `--quality-arg` are read as the command lines that they make.
    """
    words = list(command)
    passed = _passed_on(words)
    redacted: list[str] = []
    first = more = tokens = False
    for i, word in enumerate(words):
        if i in passed:
            first = more = tokens = False
            redacted.append(passed[i])
            continue
        option = len(word) > 1 and word.startswith("-") and not any(map(str.isspace, word.partition("=")[0]))
        name, equals, value = word.partition("=")
        if first or (more and not option):
            redacted.append(word if tokens and _is_token_file(word) else MASK)
            # This word may be an option and not a value, because `--hf-token` may have no value.
            first, more = option and not equals and _is_secret_option(name), not option and not tokens
            tokens = False
        elif option and _is_secret_option(name):
            tokens = name.lstrip("-") == "token"  # a be-serve token in `bench ttft`; a key in other commands
            first, more = not equals, False
            hidden = value if tokens and _is_token_file(value) else MASK
            redacted.append(f"{name}={hidden}" if equals else word)
        else:
            first = more = False
            if len(redacted) and redacted[-1].replace("_", "-") == "--be-token":
                redacted.append(
                    _without_urls(word)
                )  # ID=FILE: the id is no secret, even if it looks like a secret's name
            elif option and equals:
                hide = _without_urls if name.replace("_", "-") == "--be-token" else redact_word
                redacted.append(f"{name}={hide(value)}")
            else:
                redacted.append(redact_word(word))
    return redacted


def redact_word(word: str) -> str:
    """One word of a command line, or a variable's value, with its secrets hidden.

    The word may be a URL, a JSON value, NAME=VALUE, NAME: VALUE, or a whole command line.
    """
    if word.lstrip().startswith(("{", "[", '"')):
        try:
            return _redact_json(word)
        except (ValueError, RecursionError):
            pass  # not valid JSON: search it for names below
    # Names before URLs: a value may contain anything, such as text that looks like a URL's user.
    redacted = _without_urls(_without_pairs(word))
    if any(map(str.isspace, redacted)):
        redacted = _without_pairs(_redact_line(redacted))
    return _SHAPES.sub(MASK, redacted)


def redact_environment(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables that name a secret, and with the secrets in other values hidden."""
    return {name: redact_word(value) for name, value in env.items() if not names_a_secret(name)}


def safe_url(url: str) -> str:
    """A database or server URL for messages: scheme, host and path, without user, password and query."""
    found = _URL.match(url.strip())
    if not found:
        return _without_urls(url)
    return re.split(r"[?#]", _hide_url(found[1], url.strip()[found.end() :]), maxsplit=1)[0]


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a user, a password or a key."""
    return redact_word(url) != url


def hide(text: str, known: Iterable[str] = ()) -> str:
    """A text with its secrets hidden: the `known` ones, and those that their name, place or form reveals."""
    forms = {form for secret in known for form in _forms(secret) if form}
    for secret in sorted(forms, key=len, reverse=True):
        pattern = re.escape(secret)
        text = re.sub(pattern if len(secret) >= _REPLACED_ANYWHERE else rf"(?<!\w){pattern}(?!\w)", MASK, text)
    text = _without_bare_user_info(_URL_IN_TEXT.sub(_hide_url_in_text, text))
    text = _HEADER.sub(rf"\1\2{MASK}", text)
    return _SHAPES.sub(MASK, _without_pairs_in_text(text))


def credentials_in(url: str) -> set[str]:
    """The secret parts of a URL, encoded and decoded, for `hide`.

    Includes pieces of them, because libraries split a faulty URL differently and quote pieces in their errors.
    """
    rest = url.partition("://")[2] or url
    at = rest.rfind("@")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    parts = [rest[:at]] if at >= 0 else [] if authority and _HOSTS.fullmatch(authority) else [rest.partition("?")[0]]
    query = rest.partition("?")[2]
    start = re.search(r"(?:^|[&;?#])([^=&;?#]*)=", query)
    while start and not names_a_secret(start[1]):
        start = re.compile(r"[&;?#]([^=&;?#]*)=").search(query, start.end())
    if start:
        parts.append(query[start.end() :])
    whole = {form for part in parts for form in (part, unquote(part), unquote_plus(part))}
    return {piece for form in whole for piece in (form, *_SEPARATORS.split(form)) if piece}


def secrets_of(command: Iterable[str], env: Mapping[str, str]) -> set[str]:
    """The secrets in the command line and environment of a process, for `hide`."""
    words = list(command)
    named = {name for name in env if names_a_secret(name)} - {"PWD"}  # the shell's working folder
    found = {env[name] for name in named if len(env[name]) >= _REPLACED_ANYWHERE}
    for word, redacted in zip(words, redact(words), strict=True):
        name, _, value = word.partition("=")
        if redacted in (MASK, f"{name}={MASK}"):
            found.add(word if redacted == MASK else value)
        elif redacted != word and "://" in word:
            found |= credentials_in(word)
    return {secret for secret in found if len(secret) >= _REPLACED_ANYWHERE}


def _forms(secret: str) -> tuple[str, ...]:
    """The forms in which an error may quote a secret: unchanged, without a line end, and with escapes."""
    bare = secret.strip()
    return secret, bare, repr(bare)[1:-1], repr(bare.encode())[2:-1]


def _passed_on(words: list[str]) -> dict[int, str]:
    """The words that hold values of the options in `_PASSED_ON`, by their place, with their secrets hidden."""
    found: dict[str, list[tuple[int, str, str]]] = {}
    i = 0
    while i < len(words):
        name, equals, value = words[i].partition("=")
        if name in {option for options in _PASSED_ON for option in options}:
            if equals:
                found.setdefault(name, []).append((i, f"{name}=", value))
            elif i + 1 < len(words):
                i += 1
                found.setdefault(name, []).append((i, "", words[i]))
        i += 1
    passed: dict[int, str] = {}
    for options in _PASSED_ON:
        values = [value for option in options for value in found.get(option, [])]
        split = [_shell_words(value) for _, _, value in values]
        line = list(itertools.chain.from_iterable(split))
        redacted = iter(redact(line) if line else ())
        for (place, before, value), inner in zip(values, split, strict=True):
            shown = list(itertools.islice(redacted, len(inner)))
            passed[place] = before + (redact_word(value) if shown == inner else _line(shown))
    return passed


def _is_secret_option(name: str) -> bool:
    plain = name.lstrip("-").replace("_", "-").lower()
    shortened = any(full.startswith(plain) and len(plain) > full.find("-") + 1 for full in _ABBREVIATED)
    return names_a_secret(plain) or (shortened and plain not in ("ssl-key", "ssl-keyf", "ssl-keyfi", "ssl-keyfile"))


def _is_token_file(word: str) -> bool:
    return word.endswith(".safetensors") and "://" not in word


def _without_urls(word: str) -> str:
    """A word with the secrets in its URLs hidden. A URL with `@` is taken to reach to the end of the word."""
    pieces, start, last_at = [], 0, word.rfind("@")
    while found := _URL.search(word, start):
        end = len(word)
        if last_at < found.end():  # with `@`, white space may be part of a password
            border = _AFTER_URL_IN_WORD.search(word, found.end())
            end = border.start() if border else end
        pieces += [_without_bare_user_info(word[start : found.start()]), _hide_url(found[1], word[found.end() : end])]
        start = end
    return "".join([*pieces, _without_bare_user_info(word[start:])])


def _without_pairs(word: str) -> str:
    """A word, hidden from the first secret value on, in NAME=VALUE or NAME: VALUE. The value's end is not known."""
    for found in _PAIR.finditer(word):
        if names_a_secret(found[1]):
            return f"{word[: found.end()]}{MASK}"
    return word


def _without_bare_user_info(text: str) -> str:
    """A text with the `user:password` of addresses without a scheme hidden."""
    return _WORD.sub(_without_user, text) if "@" in text else text


def _without_user(word: re.Match[str]) -> str:
    """A word without `user:password` before its last `@`, from the first possible user on."""
    last = word[0].rfind("@")
    found = _BARE_USER.search(word[0], 0, last + 1) if last >= 0 else None
    return f"{word[0][: found.start()]}{MASK}{word[0][last:]}" if found else word[0]


def _without_pairs_in_text(text: str) -> str:
    """A text with the values of secret names hidden. A value that is no secret may itself hold names and values."""
    pieces, start, searched = [], 0, 0
    while found := _NAME_IN_TEXT.search(text, searched):
        searched = found.end()
        if names_a_secret(found[1]) and (value := _VALUE_IN_TEXT.match(text, found.end())):
            pieces += [text[start : found.end()], MASK]
            start = searched = value.end()
    return "".join([*pieces, text[start:]])


def _hide_url(scheme: str, rest: str) -> str:
    """A URL with its secrets hidden. `rest` follows `://`. A password may contain any character, also `@` and `/`."""
    in_file = scheme.lower().startswith(_FILES) and rest.startswith("/")  # then `@` and `:` belong to the file name
    if scheme.lower().startswith("sqlite") and not rest.startswith("//") and "@" in rest:
        in_file = False  # probably a user and password: the registry refuses `@` in a relative path
    at = -1 if in_file else rest.rfind("@")
    query_marks = "?#" if scheme.lower().startswith("http") else "?"  # other URLs have no fragment
    if at >= 0 and any(mark in rest[:at] for mark in query_marks):
        return f"{scheme}://{MASK}"  # the part before `@` may be a password or a query: hide both
    user = f"{MASK}@" if at >= 0 else ""
    head, mark, query = re.match(r"(?s)([^?#]*)([?#]?)(.*)", rest[at + 1 :]).groups()  # type: ignore[union-attr]
    hosts, slash, path = head.partition("/")
    if not _HOSTS.fullmatch(hosts):
        hosts = MASK
    if not hosts and ":" in path and not in_file:
        path = MASK  # probably user and password after one slash too many
    path, inner, _ = path.partition("://")  # a URL inside a URL is hidden as a whole
    if inner:
        return f"{scheme}://{user}{hosts}{slash}{path}{inner}{MASK}"
    return f"{scheme}://{user}{hosts}{slash}{path}{mark}{_hide_query(query)}"


def _hide_query(query: str) -> str:
    """A query, hidden from its first secret value on. The value may contain `&`, so all the rest is hidden."""
    for found in re.finditer(r"(?:^|(?<=[&;?#]))([^=&;?#]*)=", query):
        if names_a_secret(found[1]):
            return f"{query[: found.end()]}{MASK}"
    return query


def _hide_url_in_text(found: re.Match[str]) -> str:
    url = found[0].rstrip(_AFTER_URL)
    scheme, _, rest = url.partition("://")
    return f"{_hide_url(scheme, rest)}{found[0][len(url) :]}" if "://" in url else found[0]


def _redact_line(text: str) -> str:
    """A command line given as one word, such as the value of `--server-arg`, with its secrets hidden."""
    words = _shell_words(text)
    redacted = redact(words)
    return text if redacted == words else _line(redacted)


def _shell_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # a sentence with an apostrophe, or a truncated line
        return text.split()


def _line(redacted: Iterable[str]) -> str:
    return " ".join(word if MASK in word else shlex.quote(word) for word in redacted)


def _redact_json(text: str) -> str:
    """A JSON text with its secrets hidden; the same text if it holds none. Raises ValueError and RecursionError."""
    changed = False

    def clean(name: str, value: Any) -> Any:
        nonlocal changed
        redacted = value
        if isinstance(value, list):
            redacted = [clean(name, item) for item in value]
        elif value is not None and not isinstance(value, bool) and name and names_a_secret(name):
            redacted = MASK
        elif isinstance(value, str):
            redacted = redact_word(value)
        changed = changed or redacted != value
        return redacted

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        # Cleans each pair here: if a name occurs twice, the finished dict would have only its last value.
        return {clean("", name): clean(name, value) for name, value in found}

    redacted = clean("", json.loads(text, object_pairs_hook=pairs))
    return json.dumps(redacted, ensure_ascii=False) if changed else text
