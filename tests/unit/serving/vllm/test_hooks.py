"""The compat module's expectations, held against the installed vLLM's source."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest

from be_serve.core.errors import IncompatibleVLLM
from be_serve.serving.vllm import hooks, versions


@pytest.fixture(scope="module")
def checker():
    path = Path(__file__).parents[4] / "scripts" / "check_vllm"
    loader = SourceFileLoader("check_vllm", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_vllm", loader))
    loader.exec_module(module)
    return module


def test_the_installed_vllm_meets_every_expectation(checker):
    assert checker.failures(checker.read_installed()) == []


def test_a_changed_vllm_is_noticed(checker):
    read = checker.read_installed()

    def changed(path):
        source = read(path)
        return source and source.replace(
            "def preprocess_chat(\n        self,", "def preprocess_chat(\n        self, new,"
        )

    assert any("preprocess_chat" in problem for problem in checker.failures(changed))
    assert len(checker.failures(lambda path: None)) == len(checker.EXPECTATIONS) + len(checker.PHRASES)


def test_versions(monkeypatch):
    versions.check_version()
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.31.9")
    monkeypatch.delenv("BE_ANY_VLLM", raising=False)
    with pytest.raises(IncompatibleVLLM, match=r"0\.31\.9.*BE_ANY_VLLM"):
        versions.check_version()
    monkeypatch.setenv("BE_ANY_VLLM", "1")
    versions.check_version()


def test_a_server_of_another_shape_is_refused():
    with pytest.raises(IncompatibleVLLM, match="no chat renderer where be-serve expects it"):
        hooks.check_server(object())


async def test_the_aliases_are_made_anew_only_when_a_token_changes():
    class Listed:
        def __init__(self):
            self.data = ["tiny"]

    async def original():
        return Listed()

    models = SimpleNamespace(
        lora_requests={},
        base_model_paths=[SimpleNamespace(name="tiny")],
        is_base_model=lambda name: False,
        show_available_models=original,
        load_lora_adapter=original,
        resolve_lora=original,
    )
    records = [SimpleNamespace(id="harbor", digest="d" * 64)]
    hooks.install_aliases(SimpleNamespace(openai_serving_models=models), lambda: records)
    first, second = [(await models.show_available_models()).data for _ in range(2)]
    assert [first[0], first[1].id, len(first)] == ["tiny", "tiny:harbor", 2]
    assert second[1] is first[1]
    records = [*records, SimpleNamespace(id="cook", digest="e" * 64)]
    assert [one.id for one in (await models.show_available_models()).data[1:]] == ["tiny:harbor", "tiny:cook"]


@pytest.mark.parametrize(
    "changed", [{"tokenizer": "other"}, {"tokenizer_revision": "v2"}, {"hf_overrides": {"rope_theta": 1}}]
)
def test_a_server_whose_model_is_not_all_in_its_folder_is_refused(changed):
    """The fingerprint is of the folder: a token would answer on other ids, or another model."""

    async def preprocess_chat(
        request,
        messages,
        default_template,
        default_template_content_format,
        default_template_kwargs,
        tool_dicts,
        parser,
        skip_mm_cache,
    ): ...

    same = {"model": "m", "tokenizer": "m", "revision": "v1", "tokenizer_revision": None, "hf_overrides": {}}
    names = ("render_messages_async", "validate_token_ids", "get_tokenizer", "_executor")

    def state(config):
        base = SimpleNamespace(model_config=SimpleNamespace(**config), **dict.fromkeys(names))
        online = SimpleNamespace(renderer=base, preprocess_chat=preprocess_chat)
        return SimpleNamespace(online_renderer=online, openai_serving_models=object())

    hooks.check_server(state(same))
    with pytest.raises(IncompatibleVLLM, match="--hf-overrides"):
        hooks.check_server(state({**same, **changed}))


def test_an_adapter_named_like_an_alias_is_refused():
    """vLLM looks among its adapters first: a token's requests would be answered through one."""
    models = SimpleNamespace(lora_requests={"tiny:harbor": object()}, base_model_paths=[SimpleNamespace(name="tiny")])
    with pytest.raises(IncompatibleVLLM, match="tiny:harbor"):
        hooks.install_aliases(SimpleNamespace(openai_serving_models=models), list)


@pytest.mark.parametrize("name", ["tiny:harbor", "tiny:nobody", "tiny:", "tiny:Not an id"])
async def test_an_adapter_loaded_later_cannot_take_an_aliass_name(name):
    loaded = []

    async def load_lora_adapter(request, base_model_name=None):
        loaded.append(request.lora_name)
        return "Success"

    async def resolve_lora(lora_name):
        loaded.append(lora_name)

    models = SimpleNamespace(
        lora_requests={},
        base_model_paths=[SimpleNamespace(name="tiny")],
        is_base_model=lambda name: False,
        show_available_models=None,
        load_lora_adapter=load_lora_adapter,
        resolve_lora=resolve_lora,
    )
    hooks.install_aliases(SimpleNamespace(openai_serving_models=models), list)
    request = SimpleNamespace(lora_name=name, lora_path="/x", load_inplace=True)
    for answer in (await models.load_lora_adapter(request), await models.resolve_lora(name)):
        assert (answer.error.code, answer.error.type, answer.error.param) == (400, "InvalidUserInput", "lora_name")
        assert f"{name!r} has the form of a token's alias" in answer.error.message
    assert loaded == []
    for other in ("sailor", "other:harbor", "tiny2:harbor"):
        request.lora_name = other
        assert await models.load_lora_adapter(request, base_model_name="tiny") == "Success"
        await models.resolve_lora(other)
    assert len(loaded) == 6


def test_the_general_plugin_does_nothing_unless_named(monkeypatch):
    from be_serve.serving import general_plugin

    def fail() -> None:
        raise AssertionError("must not run")

    monkeypatch.setattr(versions, "check_version", fail)
    for value in (None, "", "other", "my_be_serve"):
        if value is None:
            monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        else:
            monkeypatch.setenv("VLLM_PLUGINS", value)
        general_plugin.register()
    monkeypatch.setenv("VLLM_PLUGINS", "other,be_serve")
    with pytest.raises(AssertionError, match="must not run"):
        general_plugin.register()


def test_a_core_is_spared_on_small_machines_only(monkeypatch):
    def after(cores, **env):
        monkeypatch.setattr(versions.os, "cpu_count", lambda: cores)
        versions.spare_a_core(env)
        return env.get("OMP_NUM_THREADS"), env.get("VLLM_CPU_OMP_THREADS_BIND")

    assert after(2) == ("1", "nobind")
    assert after(4, VLLM_CPU_OMP_THREADS_BIND="nobind") == ("3", "nobind")
    assert after(1) == ("1", "nobind")
    assert after(16) == (None, None)
    assert after(2, OMP_NUM_THREADS="2") == ("2", None)
    assert after(2, VLLM_CPU_OMP_THREADS_BIND="0-1") == (None, "0-1")
