"""A hook on a real registry with one token, and requests as vLLM hands them on, for the tests of the hook."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from be_serve.core.slots import SlotRenderer
from be_serve.registry import Registry, TokenIndex
from be_serve.serving.hook import ChatHook
from be_serve.serving.injection.byte_budget import ByteBudget
from be_serve.serving.injection.prompt_embeds import PromptEmbeds
from be_serve.serving.metrics import metrics
from be_serve.serving.resolve import Resolver
from tests.conftest import make_tokenizer
from tests.factories import PROMPT, make_token

USER = [{"role": "user", "content": "Hi"}]
FULL = [{"role": "system", "content": PROMPT}, *USER]


def make_hook(
    tmp_path,
    *,
    keys=(),
    capacity=10_000,
    placement="system",
    injection=None,
    template="chatml",
    require=False,
    **manifest,
):
    tmp_path.mkdir(exist_ok=True)
    registry = Registry(f"sqlite:///{tmp_path / 'r.db'}")
    registry.put(make_token("harbor", placement=placement, **manifest).to_bytes(), match=True)
    index = TokenIndex(registry, prepare=lambda t: torch.from_numpy(t.vectors), check=lambda t: None)
    index.refresh()
    hook = ChatHook(
        resolver=Resolver(index, lambda: ["tiny"]),
        index=index,
        slots=SlotRenderer(make_tokenizer(template)),
        injection=injection or PromptEmbeds(ByteBudget(capacity)),
        keys=list(keys),
        vocab_size=10_000,
        max_chars=10_000,
        metrics=metrics(),
        require=require,
    )
    return hook, index, registry


def request(**extra):
    known = ("prompt_logprobs", "truncate_prompt_tokens", "model", "n", "background")
    options = {k: extra.pop(k) for k in known if k in extra}
    return SimpleNamespace(model_extra=extra, **{"model": "tiny", **options})
