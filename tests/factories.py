"""Small real token files for tests."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.fingerprint import Fingerprint
from be_serve.core.prompts import prompt_sha256

FINGERPRINT = Fingerprint(config="c0" * 8, tokenizer="70" * 8, chat_template="b0" * 8, embedding="e0" * 8)
PROMPT = "You are a harbour master. Answer in rhyme."


def make_token(
    be_id: str = "harbor",
    *,
    k: int = 2,
    hidden_size: int = 8,
    seed: int = 0,
    prompt: str = PROMPT,
    fingerprint: Fingerprint = FINGERPRINT,
    text: str | None = None,
    **manifest,
) -> Token:
    vectors = np.random.default_rng(seed).normal(size=(k, hidden_size)).astype(np.float32)
    return Token(
        Manifest(
            id=be_id,
            base_model=BaseModelRef(name="tiny", fingerprint=fingerprint),
            hidden_size=hidden_size,
            k=k,
            template_digest=fingerprint.chat_template,
            prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=9, text=text),
            **{"created": datetime(2026, 1, 1, tzinfo=UTC), **manifest},
        ),
        vectors,
    )
