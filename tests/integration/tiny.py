"""Tiny models with random weights, one of each architecture that takes resident rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef, Token
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.core.prompts import prompt_sha256
from be_serve.core.slots import SlotRenderer
from tests.conftest import make_tokenizer

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
# Templates: a family without a system role is among them.
FAMILIES = {
    "Gemma2ForCausalLM": ("Gemma2Config", "gemma2"),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", "gemma3"),
    "Idefics3ForConditionalGeneration": ("Idefics3Config", "chatml"),
    "LlamaForCausalLM": ("LlamaConfig", "chatml"),
    "MistralForCausalLM": ("MistralConfig", "mistral-v3"),
    "Qwen2ForCausalLM": ("Qwen2Config", "chatml"),
    "Qwen3ForCausalLM": ("Qwen3Config", "qwen3"),
}

MEDIA = {"Idefics3ForConditionalGeneration"}
"""Those of them that take images."""
_EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_EDGE, _PATCH, _SCALE = 28, 14, 2
"""Edge of an image and of a patch in pixels, and how many patches in a row and a column become one embedding."""


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1}


def _with_eyes(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The shape of an Idefics 3 of SigLIP's eyes and Llama's tongue; its processor of images is saved in `folder`."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<global-img>"]})
    processor = transformers.Idefics3Processor(
        # vLLM's CPU build runs without torchvision, which the other processors of images need.
        image_processor=transformers.Idefics3ImageProcessorPil(
            size={"longest_edge": _EDGE}, max_image_size={"longest_edge": _EDGE}, do_image_splitting=False
        ),
        tokenizer=tokenizer,  # which learns the marks around an image
        image_seq_len=(_EDGE // _PATCH // _SCALE) ** 2,
    )
    processor.save_pretrained(folder)
    return {
        "text_config": transformers.LlamaConfig(**SHAPE, **_vocabulary(tokenizer)),
        "vision_config": transformers.Idefics3VisionConfig(**_EYES, image_size=_EDGE, patch_size=_PATCH),
        "image_token_id": processor.image_token_id,
        "scale_factor": _SCALE,
    }


@dataclass(frozen=True)
class TinyModel:
    """A model of 2 layers in float32, saved in `folder`; served as `tiny`."""

    folder: Path
    tokenizer: Any
    model: Any

    @classmethod
    def create(cls, folder: Path, architecture: str) -> TinyModel:
        config_name, template = FAMILIES[architecture]
        tokenizer = make_tokenizer(template)
        torch.manual_seed(0)
        shape: dict[str, Any] = SHAPE
        if architecture in MEDIA:
            shape = _with_eyes(tokenizer, folder)
        config = getattr(transformers, config_name)(
            **shape, **({} if architecture in MEDIA else _vocabulary(tokenizer))
        )
        model = getattr(transformers, architecture)(config).to(torch.float32)
        for parameter in model.parameters():  # far from uniform answers
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return cls(folder, tokenizer, model)

    @property
    def slots(self) -> SlotRenderer:
        return SlotRenderer(self.tokenizer)

    def identity_token(self, be_id: str, prompt: str) -> Token:
        """The prompt's own embeddings, behind the model's own scaling of them: what a trained vector stands for."""
        ids = self.slots.prompt_ids(prompt)
        vectors = self.model.get_input_embeddings()(torch.tensor(ids)).detach().numpy().astype(np.float32)
        fingerprint = fingerprint_folder(self.folder)
        return Token(
            Manifest(
                id=be_id,
                base_model=BaseModelRef(name="tiny", fingerprint=fingerprint),
                hidden_size=vectors.shape[1],
                k=len(ids),
                template_digest=fingerprint.chat_template,
                prompt=PromptRef(sha256=prompt_sha256(prompt), tokens=len(ids)),
            ),
            vectors,
        )

    def flags(self, registry: Path) -> list[str]:
        """Of `be-serve serve FOLDER`."""
        return [
            "--served-model-name=tiny",
            f"--be-registry=sqlite:///{registry}",
            "--be-rows=64",
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=512",
        ]
