"""Teacher responses from offline vLLM. The engine is a child process that ends before training begins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from be_serve.core.errors import InputError

if TYPE_CHECKING:
    from trainer.model.frozen import FrozenModel

_ROUNDING = 1024
_PATIENCE = 20
_HINT = "Omit --teacher vllm, or serve the model yourself and give --teacher-url."


class OfflineDecoder:
    """Decodes chats in a vLLM engine. The first call starts the engine; `close` ends it."""

    name = "vllm"

    def __init__(self, folder: str, model: FrozenModel) -> None:
        self._folder = folder
        self._model = model
        self._process: subprocess.Popen[str] | None = None
        self._longest = 0
        self._failed = False

    def __call__(
        self, chats: Sequence[Sequence[int]], max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Return the token ids of each chat's response, with the end-of-turn id if the response reached it.

        Raises InputError if the engine does not start, refuses the chats or dies. The engine's log is on stderr.
        """
        if self._failed:
            raise InputError(f"vLLM did not start before. Its log is above. {_HINT}")
        longest = max(map(len, chats)) + max_tokens
        if self._process is None or longest > self._longest:
            self.close()
            self._longest = min(-(-longest // _ROUNDING) * _ROUNDING, self._model.max_length)
            self._process = self._start()
        sampling = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop_token_ids": self._model.stop_ids(),
            "detokenize": False,
        }
        result = self._ask({"chats": [list(chat) for chat in chats], "sampling": sampling})
        if "error" in result:
            raise InputError(f"vLLM could not decode: {result['error'][:300]}. {_HINT}")
        return [list(map(int, ids)) for ids in result["responses"]]

    def close(self) -> None:
        """End the engine, even a hanging one, and wait until its memory is free."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(_PATIENCE)
                break
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                process.wait()
                break
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
            return answer
        except (BrokenPipeError, ValueError) as exc:
            self._failed = True
            process.stdin.close = lambda: None  # type: ignore[method-assign]  # a flush would fail: the reader is gone
            self.close()
            raise InputError(f"vLLM gave no answers. Its log is above. {_HINT}") from exc

    def _start(self) -> subprocess.Popen[str]:
        settings = {
            "model": self._folder,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self._longest,
        }
        # -P: no file in the current folder may replace a module. A new session lets `close` end all its processes.
        command = [sys.executable, "-P", "-m", "be_serve.serving.vllm.offline", json.dumps(settings)]
        return subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **self._one_gpu()},
        )

    def _one_gpu(self) -> dict[str, str]:
        """Return the environment variable that limits the child to the model's GPU; empty for a CPU."""
        device = self._model.device
        if device.type != "cuda":
            return {}
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
