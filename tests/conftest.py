"""Fixtures shared by all tests: real chat templates, a tiny tokenizer and a tiny model."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The machines that run the tests are shared: an example's wall time says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# The vendors' own chat templates, read from packages that ship them.
_TEMPLATES = {
    "chatml": ("axolotl", "chatml.jinja"),
    "llama3.2": ("trl", "llama3_2.jinja"),
    "qwen3": ("trl", "qwen3.jinja"),
    "mistral-v3": ("axolotl", "mistral_v3_tekken.jinja"),
    "mistral-v7": ("axolotl", "mistral_v7_tekken.jinja"),
    "gemma2": ("trl", "gemma.jinja"),
    "gemma3": ("trl", "gemma3.jinja"),
}
# bos_token and the further special tokens of each family.
_SPECIALS = {
    "chatml": ("<s>", ["<|im_start|>", "<|im_end|>"]),
    "llama3.2": ("<|begin_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen3": (None, ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "mistral-v3": ("<s>", ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]),
    "mistral-v7": ("<s>", ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]),
    "gemma2": ("<bos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma3": ("<bos>", ["<start_of_turn>", "<end_of_turn>"]),
}
TEMPLATE_NAMES = sorted(_TEMPLATES)


def read_template(name: str) -> str:
    package, file = _TEMPLATES[name]
    found = [f for f in importlib.metadata.files(package) or [] if f.name == file]
    assert found, f"{package} no longer ships {file}"
    return Path(str(found[0].locate())).read_text(encoding="utf-8")


def make_tokenizer(name: str = "chatml", vocab_size: int = 400):
    """A byte-level BPE tokenizer with the special tokens and the template of one family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bos, specials = _SPECIALS[name]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    text = Path(__file__).read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>", *([bos] if bos else []), *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=bos, eos_token="</s>", pad_token="</s>", extra_special_tokens=specials
    )
    fast.chat_template = read_template(name)
    return fast


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights, seeded, saved as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer("chatml")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
