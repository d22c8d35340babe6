"""The identity token: a prompt's own input embeddings. It answers exactly as the full prompt does."""

from __future__ import annotations

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.prompts import prompt_sha256
from trainer.model.frozen import FrozenModel
from trainer.provenance import versions


def identity_token(model: FrozenModel, prompt: str, be_id: str, *, with_prompt: bool = False) -> Token:
    """The token whose vectors [len(prompt ids), H] are the embedding rows of the prompt.

    The rows are what `get_input_embeddings()(ids)` gives, so feeding them equals feeding the ids.
    """
    ids = model.slots.prompt_ids(prompt, template_kwargs=model.template_kwargs)
    manifest = Manifest(
        id=be_id,
        base_model=BaseModelRef.of(model.name, model.revision, model.fingerprint),
        hidden_size=model.hidden_size,
        k=len(ids),
        literal=len(ids),
        template_digest=model.fingerprint.chat_template,
        template_kwargs=model.template_kwargs,
        prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=len(ids), text=prompt if with_prompt else None),
        recipe={"method": "from-text"},
        versions=versions(),
    )
    return Token(manifest, model.embed(ids).float().cpu().numpy())
