"""Greedy answers from Hugging Face's forward pass: `python -m benchmarks.gpu.reference MODEL IN.json OUT.json`.

IN holds `{"chats": [[ids], ...], "max_tokens": n}`. OUT holds a list of answers; an answer is a list of
positions `{"id", "logprob", "top": {id: logprob}}`. A separate process frees the GPU's memory at its end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_TOP = 8


def answers(folder: Path, chats: list[list[int]], max_tokens: int) -> list[list[dict[str, Any]]]:
    """Return the most likely token at each of `max_tokens` positions, with the next likely ones.

    An end-of-turn token does not end an answer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    made = []
    with torch.inference_mode():
        for chat in chats:
            ids, cache, places = torch.tensor([chat], device=device), None, []
            for _ in range(max_tokens):
                out = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                top = torch.log_softmax(out.logits[0, -1].float(), -1).topk(_TOP)
                likely = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                best = int(top.indices[0])
                places.append({"id": best, "logprob": likely[best], "top": likely})
                ids = top.indices[:1][None]
            made.append(places)
    return made


def main(argv: list[str]) -> None:
    """Read IN, write OUT. `argv`: MODEL, IN, OUT."""
    folder, source, out = map(Path, argv)
    given = json.loads(source.read_text(encoding="utf-8"))
    out.write_text(json.dumps(answers(folder, given["chats"], given["max_tokens"])), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
