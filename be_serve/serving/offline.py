"""vLLM without a server, in a process of its own: `python -P -m be_serve.serving.offline ENGINE`.

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


def main() -> None:
    """Decode jobs until the input ends."""
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["VLLM_PLUGINS"] = ""  # stock vLLM: nothing of ours between the prompt and its answer
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the seeds' patch must reach the engine
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    from be_serve.serving import vllm_compat

    vllm_compat.check_version()
    if vllm_compat.is_cpu_build():
        vllm_compat.spare_a_core(os.environ)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    decode = vllm_compat.offline_decoder(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        try:
            result: dict[str, object] = {"responses": decode(**json.loads(line))}
        except Exception as exc:
            result = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(result), file=channel, flush=True)


def _die_with(parent: int) -> None:
    """End this process group once the parent is gone, in the middle of a job too."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
