"""The compat module's expectations, held against the installed vLLM's source."""

from __future__ import annotations

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest

from be_serve.serving import vllm_compat


@pytest.fixture(scope="module")
def checker():
    path = Path(__file__).parents[2] / "scripts" / "check_vllm"
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
    vllm_compat.check_version()
    monkeypatch.setattr(vllm_compat, "vllm_version", lambda: "0.31.9")
    monkeypatch.delenv("BE_ANY_VLLM", raising=False)
    with pytest.raises(vllm_compat.IncompatibleVLLM, match=r"0\.31\.9.*BE_ANY_VLLM"):
        vllm_compat.check_version()
    monkeypatch.setenv("BE_ANY_VLLM", "1")
    vllm_compat.check_version()


def test_a_server_of_another_shape_is_refused():
    with pytest.raises(vllm_compat.IncompatibleVLLM, match="chat renderer elsewhere"):
        vllm_compat.check_server(object())


def test_an_adapter_named_like_an_alias_is_refused():
    """vLLM looks among its adapters first: a token's requests would be answered through one."""
    models = SimpleNamespace(lora_requests={"tiny:harbor": object()}, base_model_paths=[SimpleNamespace(name="tiny")])
    with pytest.raises(vllm_compat.IncompatibleVLLM, match="tiny:harbor"):
        vllm_compat.install_aliases(SimpleNamespace(openai_serving_models=models), list)


def test_the_general_plugin_does_nothing_unless_named(monkeypatch):
    from be_serve.serving import general_plugin

    def fail() -> None:
        raise AssertionError("must not run")

    monkeypatch.setattr(vllm_compat, "check_version", fail)
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
        monkeypatch.setattr(vllm_compat.os, "cpu_count", lambda: cores)
        vllm_compat.spare_a_core(env)
        return env.get("OMP_NUM_THREADS"), env.get("VLLM_CPU_OMP_THREADS_BIND")

    assert after(2) == ("1", "nobind")
    assert after(4, VLLM_CPU_OMP_THREADS_BIND="nobind") == ("3", "nobind")
    assert after(1) == ("1", "nobind")
    assert after(16) == (None, None)
    assert after(2, OMP_NUM_THREADS="2") == ("2", None)
    assert after(2, VLLM_CPU_OMP_THREADS_BIND="0-1") == (None, "0-1")
