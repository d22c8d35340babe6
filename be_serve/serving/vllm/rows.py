"""Resident rows in the API server's process: opens, proves, writes and holds them. For vLLM 0.32 and 0.33.

The module `engine` has the part in the workers.
"""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from be_serve.core.errors import IncompatibleVLLM, RowsBusy
from be_serve.serving.injection.resident_rows import RowIds
from be_serve.serving.injection.row_pool import Lease
from be_serve.serving.vllm.arguments import logits_processor_plugins
from be_serve.serving.vllm.engine import PROBE_ROWS, ROWS_KEY

_ATTEMPTS = 3
_TOP, _TOLERANCE = 8, 0.1
"""How many of the most likely tokens the proof compares, and the allowed difference of log-probabilities (nats)."""
_USE_PROMPT_EMBEDS = "start the server with --be-injection prompt-embeds."


@dataclass(frozen=True)
class RowTable:
    """The rows of the workers' table that belong to this server process."""

    first: int
    """The token id of row 0 of the whole table."""
    rows: range


def engine_rows(engine_client: Any) -> int:
    """Number of rows that the engine was started with; 0 if none."""
    config = engine_client.vllm_config.additional_config
    return int(config.get(ROWS_KEY, 0)) if isinstance(config, dict) else 0


async def open_rows(engine_client: Any, state: Any) -> RowTable:
    """The rows of this process, after a proof that the engine reads rows as it reads ordinary ids.

    Raises IncompatibleVLLM if the proof fails, if a client could send a row's id, or if an option of vLLM
    is not safe with rows.
    """
    await _refuse_unsafe(engine_client)
    infos = await _on_every_engine(engine_client, "be_rows_info")
    if any(
        info["first"] != infos[0]["first"] or info["rows"] != infos[0]["rows"] or not info["proven"] for info in infos
    ):
        raise IncompatibleVLLM(
            f"This model's input embedding cannot take rows for tokens ({infos}); {_USE_PROMPT_EMBEDS}"
        )
    first, count = int(infos[0]["first"]), int(infos[0]["rows"])
    highest = state.online_renderer.renderer.get_tokenizer().max_token_id
    if highest >= first:
        raise IncompatibleVLLM(
            f"The tokenizer knows ids up to {highest}, but the rows begin at {first}; {_USE_PROMPT_EMBEDS}"
        )
    for attempt in range(_ATTEMPTS):  # processes that start together share batches, and batches round differently
        try:
            await _prove_rows(engine_client, first + count)
            break
        except IncompatibleVLLM:
            if attempt + 1 == _ATTEMPTS:
                raise
            await asyncio.sleep(1)
    # No default for these two values: with overlapping rows, a process would serve the tokens of another.
    client = engine_client.engine_core
    index, clients = int(client.client_index), int(client.client_count)
    return RowTable(first, range(count * index // clients, count * (index + 1) // clients))


async def _refuse_unsafe(engine_client: Any) -> None:
    config = engine_client.vllm_config
    if engine_client.model_config.enable_prompt_embeds:
        raise IncompatibleVLLM(
            "With resident rows the engine must take no embeddings, because clients could send their own: "
            f"leave out --enable-prompt-embeds, or {_USE_PROMPT_EMBEDS}"
        )
    if config.kv_transfer_config is not None:
        raise IncompatibleVLLM(
            f"Resident rows are not safe with --kv-transfer-config; leave it out, or {_USE_PROMPT_EMBEDS}"
        )
    drafting = getattr(config.speculative_config, "method", None)
    if drafting and not all(await _on_every_engine(engine_client, "be_keep_rows_from_drafts")):
        raise IncompatibleVLLM(
            f"Resident rows are not safe with speculative decoding by {drafting}; leave it out, or {_USE_PROMPT_EMBEDS}"
        )
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise IncompatibleVLLM(
            "Resident rows are not safe with elastic EP, because a worker that joins later has no tokens in its rows; "
            f"leave it out, or {_USE_PROMPT_EMBEDS}"
        )
    if engine_client.model_config.logits_processors or logits_processor_plugins():
        raise IncompatibleVLLM(
            "Custom logits processors see the ids of a prompt and may index logits with a row's id; leave them out, or "
            f"{_USE_PROMPT_EMBEDS}"
        )


async def _on_every_engine(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """Call `method` on all workers. Returns the results of those that hold the input embedding; others return None.

    Raises IncompatibleVLLM if an engine has no such worker.
    """
    client = engine_client.engine_core
    engines = await client.call_utility_all_async("collective_rpc", method, None, args, None)
    results = [[result for result in engine if result is not None] for engine in engines]
    if not all(results):
        raise IncompatibleVLLM(
            "An engine has no rows for tokens: start every node with the same --additional-config "
            f"and with a model whose input embedding supports rows; or {_USE_PROMPT_EMBEDS}"
        )
    return [result for engine in results for result in engine]


async def _prove_rows(engine_client: Any, first_probe: int) -> None:
    """Send the engine the same prompt as ordinary ids, and with rows that hold the embeddings of these ids.

    Raises IncompatibleVLLM if the log-probabilities of the next token differ.
    """
    vocabulary = engine_client.model_config.get_vocab_size()
    ids = [(i + 1) * vocabulary // (PROBE_ROWS + 2) for i in range(PROBE_ROWS)]
    await _on_every_engine(engine_client, "be_probe_rows", ids)
    rows = RowIds([ids[0]], [first_probe + i for i in range(len(ids))], [ids[-1]], lease=None)
    for rank in _ranks(engine_client):
        plain, resident = [
            await _likely(engine_client, one, data_parallel_rank=rank) for one in ([ids[0], *ids, ids[-1]], rows)
        ]
        shared = plain.keys() & resident.keys()
        close = [abs(plain[token] - resident[token]) <= _TOLERANCE for token in shared]  # False for NaN
        if len(shared) < _TOP // 2 or not all(close):
            raise IncompatibleVLLM(
                f"The engine answers rows and the same ids differently ({resident} and {plain}); {_USE_PROMPT_EMBEDS}"
            )


def _ranks(engine_client: Any) -> list[int | None]:
    """The data-parallel ranks that this process can choose; [None] if it feeds one engine and has no choice."""
    parallel = engine_client.vllm_config.parallel_config
    if len(engine_client.engine_core.core_engines) < 2 or parallel.data_parallel_hybrid_lb:
        return [None]
    return list(range(parallel.data_parallel_size))


async def _likely(engine_client: Any, ids: list[int], **options: Any) -> dict[int, float]:
    """The most likely next tokens of a prompt, with their log-probabilities."""
    from vllm import SamplingParams

    # top_k 1 is greedy and works in every configuration but one: with drafting, vLLM on CPU crashes if a step
    # without drafts has a top_k.
    drafting = engine_client.vllm_config.speculative_config is not None
    greedy = {"temperature": 0.0} if drafting else {"temperature": 1.0, "top_k": 1}
    sampling = SamplingParams(max_tokens=1, logprobs=_TOP, ignore_eos=True, detokenize=False, **greedy)
    prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": uuid.uuid4().hex}
    request_id = f"be-serve-{uuid.uuid4().hex}"
    outputs = [one async for one in engine_client.generate(prompt, sampling, request_id, **options)]
    if not outputs or not outputs[-1].outputs[0].logprobs:
        raise IncompatibleVLLM(f"The engine did not answer the test prompt at start-up; {_USE_PROMPT_EMBEDS}")
    return {token: float(found.logprob) for token, found in outputs[-1].outputs[0].logprobs[0].items()}


async def write_rows(engine_client: Any, rows: list[int], vectors: Any) -> None:
    """Write vectors [n, hidden_size], in the serving dtype, into `rows` of every worker. Raises RowsBusy."""
    import torch

    data = vectors.contiguous().view(torch.uint8).numpy().tobytes()
    if not all(await _on_every_engine(engine_client, "be_write_rows", rows, data, vectors.shape[1])):
        raise RowsBusy("The server sleeps and cannot load a token; please try again when it is awake.")


def install_rows(state: Any, engine_client: Any) -> None:
    """Patch vLLM: accept ids of rows that this process made, and hold a request's rows until the engine is done."""
    base = state.online_renderer.renderer
    validate, generate = base.validate_token_ids, engine_client.generate

    def validate_token_ids(token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        validate(token_ids.plain if isinstance(token_ids, RowIds) else token_ids, parameter=parameter)

    def generate_with_rows(prompt: Any, *args: Any, **kwargs: Any) -> Any:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        outputs = generate(prompt, *args, **kwargs)
        return _leased(ids.lease, outputs) if isinstance(ids, RowIds) and ids.lease is not None else outputs

    base.validate_token_ids = validate_token_ids
    engine_client.generate = generate_with_rows


def _leased(lease: Lease, outputs: Any) -> Any:
    """The outputs, which hold the rows until the engine has finished or aborted the request.

    They have a lease of their own, because a background response is generated after its HTTP request ended.
    """
    own, started, loop = lease.renew(), [], asyncio.get_running_loop()

    async def held() -> Any:
        started.append(True)
        try:
            async for output in outputs:
                yield output
        finally:
            try:
                await outputs.aclose()
                await asyncio.sleep(0)  # lets vLLM send an abort that it still has to send
            finally:
                own.release()

    generator = held()

    def release_unstarted() -> None:
        if not started and not loop.is_closed():
            loop.call_soon_threadsafe(own.release)

    # A generator that never started runs no `finally`. The garbage collector may run in any thread.
    weakref.finalize(generator, release_unstarted)
    return generator
