"""Chooses the injection for a model, and makes vLLM's arguments for it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from be_serve.core.errors import InputError
from be_serve.core.redaction import hide, redact_word

PROVEN = frozenset(
    {
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Idefics3ForConditionalGeneration",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)
"""Architectures for which a test compares answers through rows and through ids.

The test is tests/integration/test_architectures.py.
"""

_UNPROVEN_WITH = {
    "--speculative-config": "speculative decoding may draft a row's id",
    "--spec-method": "speculative decoding may draft a row's id",
    "--spec-model": "speculative decoding may draft a row's id",
    "--spec-tokens": "speculative decoding may draft a row's id",
    "--kv-transfer-config": "an external KV store may confuse two tokens that used the same row",
    "--kv-offloading-size": "an external KV store may confuse two tokens that used the same row",
    "--logits-processors": "custom logits processors see the ids of a prompt",
    "--model-impl": "it chooses another implementation of the model",
    "--enable-prompt-embeds": "it asks for prompt embeds",
}
_ADDITIONAL = "--additional-config"
# vLLM's options that are also the beginning of an option named here: argparse then takes the whole name.
_WHOLE_NAMES = frozenset({"--model"})


def choose_injection(model: str, arguments: Sequence[str]) -> tuple[str, str]:
    """The injection that `auto` chooses for a model and vLLM's arguments, and the reason.

    Raises InputError if the model's config.json cannot be read. There is no default for this case, because
    replicas of one server could then choose different injections.
    """
    given = _options(arguments)
    for option, reason in _UNPROVEN_WITH.items():
        if option in given:
            return "prompt-embeds", f"{option}: {reason}"
    if "-sc" in given:
        return "prompt-embeds", f"-sc: {_UNPROVEN_WITH['--speculative-config']}"
    if plugins := logits_processor_plugins():
        return "prompt-embeds", f"{plugins[0]}: {_UNPROVEN_WITH['--logits-processors']}"
    names = _architectures(model, arguments)
    if not PROVEN.issuperset(names) or not names:
        return "prompt-embeds", f"resident rows are not proven for {', '.join(names) or 'this model'}"
    return "resident-rows", f"proven for {', '.join(names)}"


def vllm_arguments(injection: str, rows: int, arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments with the options that the injection needs. Raises InputError."""
    made = list(arguments)
    if injection == "prompt-embeds":
        return made if "--enable-prompt-embeds" in _options(made) else [*made, "--enable-prompt-embeds"]
    file = _config_file(made)
    for argument in (*reversed(made), *reversed(file)):  # --option.key VALUE: vLLM reads it after the whole option
        name, dot, _ = argument.partition("=")[0].partition(".")
        if dot and _means(_name(name), _ADDITIONAL):
            return [*made, f"{_name(name)}.be_rows", str(rows)]  # vLLM joins keys only under the same spelling
    for i in reversed(range(len(made))):  # vLLM takes the last one
        name, equals, value = made[i].partition("=")
        if _means(_name(name), _ADDITIONAL):
            text = value if equals else "".join(made[i + 1 : i + 2])
            return [*made[:i], _ADDITIONAL, _with_rows(text, rows), *made[i + (1 if equals else 2) :]]
    given = [value for name, value in file.items() if _means(_name(name), _ADDITIONAL)]
    return [*made, _ADDITIONAL, _with_rows(_as_json(given[-1]) if given else "{}", rows)]


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments with `--config=FILE` split into two words, because vLLM ignores the form with `=`."""
    pairs = ((a.partition("=")[::2] if a.startswith("--config=") else (a,)) for a in arguments)
    return [word for pair in pairs for word in pair]


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option as vLLM reads it: the last one on the command line, else the one in the --config file."""
    given = [a.partition("=")[2] for a in arguments if _means(_name(a.partition("=")[0]), option) and "=" in a]
    given += [b for a, b in itertools.pairwise(arguments) if _means(_name(a), option)]
    found = given or [str(value) for name, value in _config_file(arguments).items() if _means(_name(name), option)]
    return found[-1] if found else None


def logits_processor_plugins() -> list[str]:
    """Names of the installed logits processors, which vLLM loads by default."""
    return [entry.name for entry in importlib.metadata.entry_points(group="vllm.logits_processors")]


def _means(given: str, option: str) -> bool:
    """Whether argparse may read a word as `option`: the whole name, or an abbreviation of it."""
    # A beginning that other options share counts, too: vLLM refuses it.
    return given == option or (
        given.startswith("--") and given != "--" and given not in _WHOLE_NAMES and option.startswith(given)
    )


def _options(arguments: Sequence[str]) -> set[str]:
    """Names of the options on vLLM's command line and in its --config file. Both may abbreviate them."""
    words = {_name(a.partition("=")[0]) for a in arguments if a.startswith("-")}
    words |= {_name(key) for key in _config_file(arguments)}
    known = (*_UNPROVEN_WITH, _ADDITIONAL)
    meant = {option for option in known if any(_means(word, option) for word in words)}
    return words | meant


def _name(option: str) -> str:
    """An option's name as vLLM reads it: with dashes for underscores, and without a key after a dot."""
    return option.partition(".")[0].replace("_", "-")


def _with_rows(text: str, rows: int) -> str:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{_ADDITIONAL} takes a JSON object, not {redact_word(text)!r}.")
    return json.dumps({**config, "be_rows": rows})


def _as_json(value: Any) -> str:
    """A value of the --config file as JSON. Raises InputError for a date and for other values that JSON lacks."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise InputError(
            f"{_ADDITIONAL} in the --config file holds a value that JSON cannot hold, such as a date. Quote it."
        ) from None


def _yaml_problem(exc: Exception) -> str:
    """What is wrong with a YAML text, and where, without any part of the text."""
    problem = getattr(exc, "problem", None)
    # A problem may quote a tag, an alias or a character of the file.
    said = re.sub(r"(?s)['\"].*['\"]", "...", problem) if isinstance(problem, str) else "no valid YAML in UTF-8"
    mark = getattr(exc, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return re.split("['\"]", said)[0].strip() + where


def _config_file(arguments: Sequence[str]) -> dict[str, Any]:
    """The options that vLLM reads from its --config file: `--name` to value. Raises InputError.

    As in vLLM, an option with the value false or an empty list is left out, and only the two words
    `--config FILE` name a file.
    """
    if "--config" not in arguments:
        return {}
    import yaml

    where = list(arguments).index("--config") + 1
    path = Path("".join(arguments[where : where + 1]))
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(f"Cannot read --config {path}: {exc.strerror}.") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: no UTF-8, or a date like 2026-13-01
        # Without the cause, whose text quotes the line, which may hold a key.
        raise InputError(f"Cannot read --config {path}: {_yaml_problem(exc)}.") from None
    if not isinstance(found, dict):
        return {}
    return {f"--{key}": value for key, value in found.items() if value is not False and value != []}


def _architectures(model: str, arguments: Sequence[str]) -> list[str]:
    """The architectures in the model's config.json; empty if it names none. Runs no code of the model."""
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=value_of("--revision", arguments))
    except (OSError, ValueError) as exc:
        raise InputError(
            f"--be-injection auto needs the config.json of {model}, but cannot read it: {hide(str(exc))} "
            "If vLLM can read it, name the injection: --be-injection resident-rows or prompt-embeds."
        ) from exc
    return list(config.get("architectures") or [])
