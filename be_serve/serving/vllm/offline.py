"""Runs vLLM without a server, in its own process: `python -P -m be_serve.serving.vllm.offline ENGINE`.

ENGINE is a JSON object with the engine's settings. Each line on standard input is a job; each line on
standard output is the job's result or error. vLLM's own output goes to standard error. The process ends
when its input or its parent ends, and frees all its memory.
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
    """Decode jobs until standard input ends."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_PLUGINS"] = ""  # stock vLLM: no plugin may change the prompt or its answer
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must run here, where patch_cpu_seed applies
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
    """Start an engine in this process, and return a function that decodes chats.

    The function takes `chats` (token ids) and `sampling` (fields of vLLM's SamplingParams), and returns the
    token ids of each response.
    """
    from vllm import LLM, SamplingParams

    memory: dict[str, Any] = {}
    if engine.on_cpu():
        engine.patch_cpu_seed()
    else:
        import torch

        free, total = torch.cuda.mem_get_info()  # the trainer's model already occupies memory of this device
        memory["gpu_memory_utilization"] = 0.85 * free / total
    llm = LLM(model=model, dtype=dtype, max_model_len=max_model_len, enforce_eager=engine.on_cpu(), **memory)

    def decode(chats: Sequence[Sequence[int]], sampling: dict[str, Any]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(chat)} for chat in chats]
        outputs = llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return decode


def _end_with_parent(parent: int) -> None:
    """Kill this process group when the process `parent` has ended, even during a job."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
