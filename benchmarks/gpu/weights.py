"""Make a model of a shape with random weights: `python -m benchmarks.gpu.weights SHAPE OUT --tokenizer FOLDER`.

The distribution of the weights makes answers comparable. Each layer adds as much as the residual
holds, so that every answer depends on the whole prompt. Ids that the tokenizer cannot write as text
are unlikely, so that a streaming client receives text for every sampled token. Both choices leave
the cost of a step unchanged.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import SHAPES, Shape, tiny

_SHARD_BYTES = 4 * 1024**3
_SHARP = 1.5
"""Factor on the query and key weights, so that attention differs between positions."""
_CLEAR = 4.0
"""Factor on the embedding rows, so that rounding seldom changes the order of the logits."""
_UNLIKELY = 0.02
"""Factor on the embedding rows of ids that are not text alone."""


def make_model(shape: Shape, out: Path, tokenizer: Path, *, seed: int = 0) -> None:
    """Write a bfloat16 Hugging Face folder. A rename at the end makes it visible at once.

    All ids of the tokenizer must be inside the shape's vocabulary.
    """
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    config = getattr(transformers, shape.config)(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=131_072,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = torch.Generator(device).manual_seed(seed)
    scale_V1 = _likelihood(words, shape.vocabulary).to(device)[:, None]

    work = out.with_name(f".{out.name}-{os.getpid()}")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    shard: dict[str, Any] = {}
    files: dict[str, str] = {}
    held = total = 0

    def flush() -> None:
        nonlocal held
        if shard:
            name = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(shard, work / name, metadata={"format": "pt"})
            files.update(dict.fromkeys(shard, name))
            shard.clear()
            held = 0

    for name, parameter in model.named_parameters():  # a tied head appears once
        value = _draw(name, tuple(parameter.shape), rng, device, scale_V1)
        shard[name] = value.to("cpu").contiguous()
        held += shard[name].nbytes
        total += shard[name].nbytes
        if held >= _SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (work / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(work)
    model.generation_config.save_pretrained(work)
    words.save_pretrained(work)
    work.rename(out)


def _draw(name: str, shape: tuple[int, ...], rng: Any, device: str, scale_V1: Any) -> Any:
    """Return random bfloat16 weights [shape]. Input of unit variance gives output of about unit variance."""
    import torch

    if len(shape) == 1:
        return torch.full(shape, _SHARP if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0).bfloat16()
    words = shape[0] == len(scale_V1)
    factor = _CLEAR if words else _SHARP if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    value = torch.empty(shape, dtype=torch.bfloat16, device=device)
    value.normal_(0.0, factor * shape[1] ** -0.5, generator=rng)
    return value * scale_V1.to(value.dtype) if words else value


def _likelihood(words: Any, vocabulary: int) -> Any:
    """Return a factor for each id, [vocabulary]: 1 for ids that are text alone and special ids, else `_UNLIKELY`."""
    import torch

    special = set(words.all_special_ids)
    texts = words.batch_decode([[i] for i in range(len(words))])
    plain = [bool(text) and "\ufffd" not in text and i not in special for i, text in enumerate(texts)]
    found = torch.full((vocabulary,), _UNLIKELY)
    found[: len(plain)][torch.tensor(plain)] = 1.0
    # Special ids keep their full norm, because every chat template puts them into the input.
    found[sorted(special)] = 1.0
    return found


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    make_model(tiny(shape) if given.tiny else shape, given.out, given.tokenizer)


if __name__ == "__main__":
    main()
