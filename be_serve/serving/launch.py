"""How a server is started for its injection: which one fits, and vLLM's arguments for it."""

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
"""Architectures that a test has seen answer through rows as through ids (tests/integration/test_architectures.py)."""

_UNPROVEN_WITH = {
    "--speculative-config": "speculative decoding may draft a row's id",
    "--spec-method": "speculative decoding may draft a row's id",
    "--spec-model": "speculative decoding may draft a row's id",
    "--spec-tokens": "speculative decoding may draft a row's id",
    "--kv-transfer-config": "a KV store outside vLLM may not tell the owners of a row apart",
    "--kv-offloading-size": "a KV store outside vLLM may not tell the owners of a row apart",
    "--logits-processors": "custom logits processors are shown the ids of a prompt",
    "--model-impl": "another implementation of the model was chosen",
    "--enable-prompt-embeds": "prompt embeds were asked for",
}
_ADDITIONAL = "--additional-config"
_SHORTEST = 6


def choose_injection(model: str, arguments: Sequence[str]) -> tuple[str, str]:
    """The injection that `auto` takes for a model and vLLM's arguments, and why.

    Raises InputError where the model's config.json cannot be read: replicas of one server must not guess apart.
    """
    given = _options(arguments)
    for option, reason in _UNPROVEN_WITH.items():
        if any(_means(name, option) for name in given):
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
    """vLLM's arguments with what an injection needs of the engine. Raises InputError."""
    made = list(arguments)
    if injection == "prompt-embeds":
        given = any(_means(name, "--enable-prompt-embeds") for name in _options(made))
        return made if given else [*made, "--enable-prompt-embeds"]
    for i, argument in enumerate(made):
        name, equals, value = argument.partition("=")
        if _means(name.replace("_", "-"), _ADDITIONAL):
            text = value if equals else "".join(made[i + 1 : i + 2])
            return [*made[:i], _ADDITIONAL, _with_rows(text, rows), *made[i + (1 if equals else 2) :]]
    if any(argument.replace("_", "-").startswith(f"{_ADDITIONAL}.") for argument in made):  # given key by key
        return [*made, f"{_ADDITIONAL}.be_rows", str(rows)]
    file = {key.replace("_", "-"): value for key, value in _config_file(made).items()}
    given = file.get("additional-config", {})
    return [*made, _ADDITIONAL, _with_rows(given if isinstance(given, str) else json.dumps(given), rows)]


def logits_processor_plugins() -> list[str]:
    """Logits processors that vLLM loads because they are installed."""
    return [entry.name for entry in importlib.metadata.entry_points(group="vllm.logits_processors")]


def _means(given: str, option: str) -> bool:
    """Whether an option as given is `option` for argparse, which takes what is short and unambiguous."""
    return given == option or (len(given) >= _SHORTEST and option.startswith(given))


def _with_rows(text: str, rows: int) -> str:
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{_ADDITIONAL} takes a JSON object, not {redact_word(text)!r}.")
    return json.dumps({**config, "be_rows": rows})


def _options(arguments: Sequence[str]) -> list[str]:
    """Names of the options given, as vLLM reads them: underscores, `=value` and `.key` set apart; --config's too."""
    names = [a.split("=")[0].split(".")[0].replace("_", "-") for a in arguments if a.startswith("-")]
    return names + [f"--{key.replace('_', '-')}" for key in _config_file(arguments)]


def _config_file(arguments: Sequence[str]) -> dict[str, Any]:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            import yaml

            path = Path(value if equals else "".join(arguments[i + 1 : i + 2]))
            try:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
                raise InputError(f"Cannot read --config {path}: {exc}.") from exc
            return found if isinstance(found, dict) else {}
    return {}


def _architectures(model: str, arguments: Sequence[str]) -> list[str]:
    """The model's architectures by its config.json, none where it names none; no code of the model's is run."""
    from transformers import PretrainedConfig

    given = [a.partition("=")[2] for a in arguments if a.startswith("--revision=")]
    given += [b for a, b in itertools.pairwise(arguments) if a == "--revision"]
    revision = given[-1] if given else None
    try:
        config, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    except (OSError, ValueError) as exc:
        raise InputError(
            f"--be-injection auto reads the config.json of {model}, and cannot: {hide(str(exc))} "
            "If vLLM can, name the injection: resident-rows or prompt-embeds."
        ) from exc
    return list(config.get("architectures") or [])
