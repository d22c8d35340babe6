"""The teacher's responses by vLLM offline: a child process that is gone before training begins."""

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
_HINT = "Leave out --teacher vllm, or serve the model yourself and give --teacher-url."


class OfflineDecoder:
    """Decodes chats in an engine that is started with the first of them and ends with `close`."""

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
        """Response ids to each chat (ids), the end of the turn included where it was reached.

        Raises InputError where the engine does not start, refuses or dies; its log stands above.
        """
        if self._failed:
            raise InputError(f"vLLM did not start before; its log is above. {_HINT}")
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
        """End the engine, whatever it does, and wait until its memory is free."""
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
            found: dict[str, Any] = json.loads(process.stdout.readline())
            return found
        except (BrokenPipeError, ValueError) as exc:
            self._failed = True
            process.stdin.close = lambda: None  # type: ignore[method-assign]  # what is left in it reaches nobody
            self.close()
            raise InputError(f"vLLM gave no answers; its log is above. {_HINT}") from exc

    def _start(self) -> subprocess.Popen[str]:
        settings = {
            "model": self._folder,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "max_model_len": self._longest,
        }
        # -P: nothing in the current folder may stand in for a module. A session of its own, to end all of it.
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
        """The variable that shows the child the model's own GPU, and no other."""
        device = self._model.device
        if device.type != "cuda":
            return {}
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = device.index or 0
        return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}
