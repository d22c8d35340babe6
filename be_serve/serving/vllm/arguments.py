"""Chooses the injection for a model, and makes vLLM's arguments for it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
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
_SHORTEST_PREFIX = 6
# A whole option name that is also the beginning of another option: argparse then takes the whole name.
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
    for i, argument in enumerate(made):
        name, equals, value = argument.partition("=")
        if _means(name.replace("_", "-"), _ADDITIONAL):
            text = value if equals else "".join(made[i + 1 : i + 2])
            return [*made[:i], _ADDITIONAL, _with_rows(text, rows), *made[i + (1 if equals else 2) :]]
    file = _config_file(made)
    if any(name.replace("_", "-").startswith(f"{_ADDITIONAL}.") for name in (*made, *file)):  # as --option.key VALUE
        return [*made, f"{_ADDITIONAL}.be_rows", str(rows)]
    given: Any = next((value for name, value in file.items() if name.replace("_", "-") == _ADDITIONAL), {})
    return [*made, _ADDITIONAL, _with_rows(given if isinstance(given, str) else json.dumps(given), rows)]


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """vLLM's arguments with `--config=FILE` split into two words, because vLLM ignores the form with `=`."""
    pairs = ((a.partition("=")[::2] if a.startswith("--config=") else (a,)) for a in arguments)
    return [word for pair in pairs for word in pair]


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The value of an option as vLLM reads it: the last one on the command line, else the one in the --config file."""
    given = [a.partition("=")[2] for a in arguments if _name(a.partition("=")[0]) == option and "=" in a]
    given += [b for a, b in itertools.pairwise(arguments) if _name(a) == option]
    found = given or [str(value) for name, value in _config_file(arguments).items() if _name(name) == option]
    return found[-1] if found else None


def logits_processor_plugins() -> list[str]:
    """Names of the installed logits processors, which vLLM loads by default."""
    return [entry.name for entry in importlib.metadata.entry_points(group="vllm.logits_processors")]


def _means(given: str, option: str) -> bool:
    """Whether argparse may read a word as `option`: the whole name, or an abbreviation of it."""
    return given == option or (
        len(given) >= _SHORTEST_PREFIX and given not in _WHOLE_NAMES and option.startswith(given)
    )


def _options(arguments: Sequence[str]) -> set[str]:
    """Names of the options on vLLM's command line, where they may be abbreviated, and in its --config file."""
    words = {_name(a.partition("=")[0]) for a in arguments if a.startswith("-")}
    known = (*_UNPROVEN_WITH, _ADDITIONAL)
    meant = {option for option in known if any(_means(word, option) for word in words)}
    return words | meant | {_name(key) for key in _config_file(arguments)}


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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise InputError(f"Cannot read --config {path}: {exc}.") from exc
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
