"""The class `LLM`, which uses tokens without a server: `from be_serve.llm import LLM`."""

from __future__ import annotations

from be_serve.serving.vllm.llm import LLM

__all__ = ["LLM"]
