"""Changes to vLLM in the engine's core and worker processes, for vLLM 0.32 and 0.33.

Resident rows: a table next to the input embedding holds the vectors of tokens. The ids of its rows are higher
than all ids of the vocabulary. A request with a token is then plain token ids: no tensor is sent with it, the
compiled graph does not change, and vLLM caches KV blocks by ids as usual. No text is tokenised to a row's id,
and no logit belongs to one. So a client cannot write such an id, and the model cannot sample it. The output
head is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROWS_KEY = "be_rows"
"""Key of vLLM's `--additional-config` with the number of rows. vLLM hashes it for its cache of compiled graphs."""
PROBE_ROWS = 4
"""Extra rows after those for tokens, for the proof at start-up. One more row measures the model's scale."""
_GAP = 1024
"""Unused ids between the padded vocabulary and the rows, because some tokenizers have more ids than the model."""
_PADDING = 1024
"""Upper limit for the padding of a vocabulary, in ids."""


def configured_rows() -> int:
    """Number of rows in the configuration of the engine that vLLM is building; 0 if none."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config().additional_config
    return int(config.get(ROWS_KEY, 0)) if isinstance(config, dict) else 0


def install_resident_rows() -> None:
    """Patch vLLM's input embedding, workers, penalties and LoRA for rows. May be called more than once."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if "VocabParallelEmbedding" in op_registry_oot:
        return
    VocabParallelEmbedding.register_oot(_resident_embedding(), name="VocabParallelEmbedding")
    _patch_workers()
    _patch_penalties()
    _patch_lora()


def _with_rows(layer: Any, ids: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
    """Embeddings [..., hidden_size] of ids. Ids from `layer.be_first` on are read from the layer's table of rows."""
    import torch
    from torch.nn import functional as F

    row = ids - layer.be_first
    resident = row >= 0
    # The vocabulary may be sharded over ranks and summed. The table is not sharded: each rank has all rows.
    from_vocabulary = look_up(ids.masked_fill(resident, 0))
    from_rows = F.embedding(row.clamp(0, len(layer.be_rows) - 1), layer.be_rows)
    return torch.where(resident.unsqueeze(-1), from_rows, from_vocabulary)


def _resident_embedding() -> type[Any]:
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    class ResidentEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
        """vLLM's input embedding with a table of rows [rows + PROBE_ROWS + 1, hidden_size]."""

        be_rows: Tensor | None
        be_alone: bool
        """Whether LoRA is skipped. Outside a step of the engine, adapters do not know what to add."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            rows = configured_rows()
            text = get_current_vllm_config().model_config.hf_text_config
            shape = (text.vocab_size, text.hidden_size)
            whole = self.reduce_results and (self.num_embeddings, self.embedding_dim) == shape
            table = torch.zeros(rows + PROBE_ROWS + 1, self.embedding_dim, dtype=self.params_dtype)
            self.register_buffer("be_rows", table if rows and whole else None, persistent=False)
            self.be_first = self.num_embeddings_padded + _GAP
            self.be_alone = False

        def forward(self, input_: Tensor) -> Tensor:
            if self.be_rows is None:
                return super().forward(input_)
            return _with_rows(self, input_, super().forward)

    return ResidentEmbedding


def _layers(worker: Any) -> list[Any]:
    """The embedding layers with rows of a worker's model. Found once, because a weight update replaces tensors."""
    if not hasattr(worker, "be_layers"):
        model = worker.model_runner.get_model()
        # Looks at the buffers, because a LoRA layer also has the attributes of the layer that it wraps.
        worker.be_layers = [layer for layer in model.modules() if layer._buffers.get("be_rows") is not None]
        # After a weight update vLLM puts the same tensors back, with their contents.
        worker.be_tables = [layer.be_rows for layer in worker.be_layers]
    return worker.be_layers  # type: ignore[no-any-return]


class WorkerRows:
    """Methods that server processes call on each worker, by name. Arguments and results are built-in types."""

    def be_rows_info(self: Any) -> dict[str, Any] | None:
        """First id, number, scale and state of this worker's rows; None if its input embedding has no rows.

        `scale` is the factor by which the model multiplies its embeddings (in Gemma the square root of the
        hidden size). It is measured with a known row. `proven` says whether the measurement is consistent.
        """
        import torch

        layers = _layers(self)
        if not layers:
            return None
        layer, model = layers[0], self.model_runner.get_model()
        rows = len(layer.be_rows) - PROBE_ROWS - 1
        with torch.inference_mode():
            known_H = torch.linspace(0.5, 1.0, layer.embedding_dim).to(layer.be_rows)
            layer.be_rows[-1] = known_H
            last = layer.be_first + len(layer.be_rows) - 1
            layer.be_alone = True
            try:
                found_H = model.embed_input_ids(torch.tensor([last], device=known_H.device))[0].float()
            finally:
                layer.be_alone = False
        self.be_scale = float((found_H / known_H.float()).median())
        proven = self.be_scale > 0 and torch.allclose(found_H, self.be_scale * known_H.float(), rtol=2e-2)
        return {"first": layer.be_first, "rows": rows, "scale": self.be_scale, "proven": bool(proven)}

    def be_write_rows(self: Any, rows: list[int], data: bytes, hidden_size: int) -> bool:
        """Write vectors [n, hidden_size], as raw bytes of the model's dtype, into `rows`. Needs `be_rows_info` first.

        Returns False and writes nothing while the worker sleeps, because its memory is freed then.
        """
        import torch

        layers = _layers(self)
        if getattr(self, "be_asleep", False):
            return False
        for _, table in zip(layers, self.be_tables, strict=True):
            vectors_NH = torch.frombuffer(bytearray(data), dtype=table.dtype).view(len(rows), hidden_size)
            with torch.inference_mode():
                at = torch.tensor(rows, device=table.device)
                table[at] = (vectors_NH.float() / self.be_scale).to(table.device, table.dtype)
        return True

    def be_probe_rows(self: Any, ids: list[int]) -> bool:
        """Write the embeddings of `PROBE_ROWS` ordinary ids into the probe rows, in the same way as a token."""
        import torch

        for layer, table in zip(_layers(self), self.be_tables, strict=True):
            with torch.inference_mode():
                found_NH = layer(torch.tensor(ids, device=table.device)).float() * self.be_scale
            data = found_NH.to("cpu", table.dtype).contiguous().view(torch.uint8).numpy().tobytes()
            first = len(table) - PROBE_ROWS - 1
            self.be_write_rows(list(range(first, first + PROBE_ROWS)), data, layer.embedding_dim)
        return True

    def be_keep_rows_from_drafts(self: Any) -> bool:
        """Keep ids of rows out of drafts. Returns False if this worker's drafting method does not allow that.

        A row's id has no logit, so vLLM cannot verify it in a draft. N-gram drafting on the host copies ids of
        the prompt; after this call a copy ends before the first row. Other methods are not supported.
        """
        drafter: Any = getattr(self.model_runner, "drafter", None)
        if type(drafter).__name__ != "NgramProposer":
            return False
        if not hasattr(drafter, "be_propose"):
            drafter.be_propose = drafter.propose
            drafter.propose = partial(_propose_in_vocabulary, drafter.be_propose, self.model_config.get_vocab_size())
        return True


def _propose_in_vocabulary(propose: Callable[..., list[list[int]]], vocabulary: int, *args: Any, **kwargs: Any) -> Any:
    """The drafts of `propose`, each cut before its first id outside the vocabulary."""
    return [list(takewhile(lambda token: token < vocabulary, draft)) for draft in propose(*args, **kwargs)]


def _patch_workers() -> None:
    from vllm.v1.worker.gpu_worker import Worker  # also the base class of the CPU worker

    for name in ("be_rows_info", "be_write_rows", "be_probe_rows", "be_keep_rows_from_drafts"):
        setattr(Worker, name, getattr(WorkerRows, name))
    sleep, wake_up = Worker.sleep, Worker.wake_up

    def sleep_without_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.be_asleep = True
        return sleep(self, *args, **kwargs)

    def wake_up_with_rows(self: Any, tags: list[str] | None = None) -> Any:
        woken = wake_up(self, tags)
        if tags is None or "weights" in tags:
            self.be_asleep = False
        return woken

    Worker.sleep, Worker.wake_up = sleep_without_rows, wake_up_with_rows


def _patch_penalties() -> None:
    """Make penalties ignore rows. vLLM counts the ids of a prompt in an array as long as the vocabulary."""
    import torch
    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.worker.gpu_input_batch import InputBatch

    original = InputBatch._make_prompt_token_ids_cpu_tensor

    def _make_prompt_token_ids_cpu_tensor(self: Any) -> Any:
        return original(self).clamp_(max=self.vocab_size)  # vLLM's padding id, whose count vLLM drops

    InputBatch._make_prompt_token_ids_cpu_tensor = _make_prompt_token_ids_cpu_tensor
    if not HAS_TRITON:
        return
    from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

    original_init = PenaltiesState.__init__

    def __init__(self: Any, vllm_config: Any, req_states: Any) -> None:
        original_init(self, vllm_config, req_states)
        config = vllm_config.additional_config
        rows = int(config.get(ROWS_KEY, 0)) if isinstance(config, dict) else 0
        if rows:  # one bit for every id that a prompt can contain; bits of rows belong to no logit
            highest = req_states.vocab_size + _PADDING + _GAP + rows + PROBE_ROWS + 1
            mask = self.prompt_bin_mask
            self.prompt_bin_mask = torch.zeros(len(mask), highest // 32 + 1, dtype=mask.dtype, device=mask.device)

    PenaltiesState.__init__ = __init__
    _patch_prompt_logprobs()


def _patch_prompt_logprobs() -> None:
    """Let vLLM compute prompt_logprobs for a batch that contains rows.

    If one request asks for them, Model Runner V2 computes them for all prompts of the batch, and a row has no
    logit. A row gets the value of another id. Nobody reads this value: a request with a token cannot ask for
    prompt_logprobs.
    """
    from vllm.v1.worker.gpu.sample import prompt_logprob

    compute = prompt_logprob.compute_prompt_logprobs_with_chunking

    def compute_prompt_logprobs_with_chunking(
        prompt_token_ids: Tensor,
        prompt_hidden_states: Tensor,
        logits_fn: Callable[[Tensor], Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        highest = logits_fn(prompt_hidden_states[:1]).shape[-1] - 1
        return compute(prompt_token_ids.clamp(max=highest), prompt_hidden_states, logits_fn, *args, **kwargs)

    prompt_logprob.compute_prompt_logprobs_with_chunking = compute_prompt_logprobs_with_chunking


def _patch_lora() -> None:
    """Make a LoRA adapter of the embedding change the vocabulary's ids only, and not rows."""
    from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA

    original = VocabParallelEmbeddingWithLoRA.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self.base_layer, "be_rows", None) is None:
            return original(self, x)
        if self.base_layer.be_alone:
            return self.base_layer(x)
        return _with_rows(self.base_layer, x, partial(original, self))

    VocabParallelEmbeddingWithLoRA.forward = forward


def patch_cpu_seed() -> None:
    """Patch the CPU engine so that a sampled request with a seed works with a chunked prefill.

    After each chunk but the last, vLLM discards the sampled token and resets the random generator with
    `Generator.set_offset`. CPU generators have no such method, and the engine crashes. The patch restores the
    generator's whole state instead. A seeded answer then also does not depend on the chunks.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if getattr(CPUModelRunner, "_be_serve_seed", False):
        return
    original_sample, original_sync = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def discarded(runner: Any) -> list[int]:
        count = runner.input_batch.num_reqs
        mask = runner.discard_request_mask.np[:count]
        return [int(i) for i in mask.nonzero()[0] if int(i) in runner.input_batch.generators]

    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        before = {i: generators[i].get_state() for i in discarded(self)}
        output = original_sample(self, *args, **kwargs)
        for i, state in before.items():
            generators[i].set_state(state)
        return output

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        hidden = {i: generators.pop(i) for i in discarded(self)}
        try:
            return original_sync(self, *args, **kwargs)
        finally:
            generators.update(hidden)

    CPUModelRunner._sample = _sample
    CPUModelRunner._bookkeeping_sync = _bookkeeping_sync
    CPUModelRunner._be_serve_seed = True


def on_cpu() -> bool:
    """Whether vLLM runs on its CPU platform."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
