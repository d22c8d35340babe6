"""vLLM without a server, in a process of its own: `python -P -m be_serve.serving.vllm.offline ENGINE`.

ENGINE is a JSON object with the engine's settings. Each line on standard input is a job,
each line on standard output its result or the error; vLLM's own words go to standard
error. The process ends with its input or its parent, and all its memory is free again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from be_serve.serving.vllm import engine, versions


def main() -> None:
    """Decode jobs until the input ends."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_PLUGINS"] = ""  # stock vLLM: nothing of ours between the prompt and its answer
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the seeds' patch must reach the engine
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    versions.check_version()
    if versions.is_cpu_build():
        versions.spare_a_core(os.environ)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    decode = offline_decoder(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        try:
            result: dict[str, object] = {"responses": decode(**json.loads(line))}
        except Exception as exc:
            result = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(result), file=channel, flush=True)


def offline_decoder(model: str, dtype: str, max_model_len: int) -> Callable[..., list[list[int]]]:
    """An engine without a server, in this process: response ids to chats given as ids.

    The result takes `chats` and `sampling` (fields of vLLM's SamplingParams).
    """
    from vllm import LLM, SamplingParams

    memory: dict[str, Any] = {}
    if engine.on_cpu():
        engine.patch_cpu_seed()
    else:
        import torch

        free, total = torch.cuda.mem_get_info()  # the trainer's own model lies on the device already
        memory["gpu_memory_utilization"] = 0.85 * free / total
    llm = LLM(model=model, dtype=dtype, max_model_len=max_model_len, enforce_eager=engine.on_cpu(), **memory)

    def decode(chats: Sequence[Sequence[int]], sampling: dict[str, Any]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(chat)} for chat in chats]
        made = llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in made]

    return decode


def _die_with(parent: int) -> None:
    """End this process group once the parent is gone, in the middle of a job too."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
