"""A server process's side of resident rows: opened, proven, written, held. For vLLM 0.32 and 0.33.

`engine` is the other side, in the workers.
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
"""Of how many likely tokens the log-probabilities are compared, and how far bfloat16 may move them (nats)."""
_INSTEAD = "start the server with --be-injection prompt-embeds."


@dataclass(frozen=True)
class RowTable:
    """The part of the workers' rows that belongs to this server process."""

    first: int
    """Id of row 0 of all."""
    rows: range


def engine_rows(engine_client: Any) -> int:
    """Rows with which the engine was started; 0 for none."""
    config = engine_client.vllm_config.additional_config
    return int(config.get(ROWS_KEY, 0)) if isinstance(config, dict) else 0


async def open_rows(engine_client: Any, state: Any) -> RowTable:
    """The rows of this process, once it is proven that the engine reads them as it reads ordinary ids.

    Raises IncompatibleVLLM where it does not, where a client could name a row's id, or
    where something beside the engine may not tell the owners of a row apart.
    """
    await _refuse_unsafe(engine_client)
    found = await _on_every_engine(engine_client, "be_rows_info")
    if any(one["first"] != found[0]["first"] or one["rows"] != found[0]["rows"] or not one["proven"] for one in found):
        raise IncompatibleVLLM(f"This model's input embedding cannot take rows for tokens ({found}); {_INSTEAD}")
    first, count = int(found[0]["first"]), int(found[0]["rows"])
    highest = state.online_renderer.renderer.get_tokenizer().max_token_id
    if highest >= first:
        raise IncompatibleVLLM(f"The tokenizer knows ids up to {highest}, the rows begin at {first}; {_INSTEAD}")
    for attempt in range(_ATTEMPTS):  # processes that start together share batches, which round differently
        try:
            await _prove_rows(engine_client, first + count)
            break
        except IncompatibleVLLM:
            if attempt + 1 == _ATTEMPTS:
                raise
            await asyncio.sleep(1)
    # Processes that took one another's rows would serve one another's tokens: no guess if these are missing.
    client = engine_client.engine_core
    index, clients = int(client.client_index), int(client.client_count)
    return RowTable(first, range(count * index // clients, count * (index + 1) // clients))


async def _refuse_unsafe(engine_client: Any) -> None:
    config = engine_client.vllm_config
    if engine_client.model_config.enable_prompt_embeds:
        raise IncompatibleVLLM(
            "With resident rows the engine must take no embeddings, for clients could send their own: "
            f"leave --enable-prompt-embeds out, or {_INSTEAD}"
        )
    if config.kv_transfer_config is not None:
        raise IncompatibleVLLM(f"Resident rows are not safe beside --kv-transfer-config; {_INSTEAD}")
    drafting = getattr(config.speculative_config, "method", None)
    if drafting and not all(await _on_every_engine(engine_client, "be_keep_rows_from_drafts")):
        raise IncompatibleVLLM(f"Resident rows are not safe beside speculative decoding by {drafting}; {_INSTEAD}")
    if getattr(config.parallel_config, "enable_elastic_ep", False):
        raise IncompatibleVLLM(f"Workers that join later have no token in their rows (elastic EP); {_INSTEAD}")
    if engine_client.model_config.logits_processors or logits_processor_plugins():
        raise IncompatibleVLLM(
            f"Custom logits processors are shown the ids of a prompt, and may index logits with a row's; {_INSTEAD}"
        )


async def _on_every_engine(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """The answers of all workers that hold the input embedding (others say None). Raises where an engine has none."""
    client = engine_client.engine_core
    engines = await client.call_utility_all_async("collective_rpc", method, None, args, None)
    found = [[answer for answer in answers if answer is not None] for answers in engines]
    if not all(found):
        raise IncompatibleVLLM(
            "An engine has no rows for tokens: start every node with the same --additional-config, "
            f"and a model whose input embedding is known; or {_INSTEAD}"
        )
    return [answer for answers in found for answer in answers]


async def _prove_rows(engine_client: Any, first_probe: int) -> None:
    """Ask the engine the same thing in ordinary ids and through rows that hold those ids' embeddings."""
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
                f"The engine answers rows otherwise than the same ids ({plain} against {resident}); {_INSTEAD}"
            )


def _ranks(engine_client: Any) -> list[int | None]:
    """Data-parallel ranks that this process can choose between; none to choose where it feeds one engine."""
    parallel = engine_client.vllm_config.parallel_config
    if len(engine_client.engine_core.core_engines) < 2 or parallel.data_parallel_hybrid_lb:
        return [None]
    return list(range(parallel.data_parallel_size))


async def _likely(engine_client: Any, ids: list[int], **options: Any) -> dict[int, float]:
    """The likeliest next tokens of a prompt with their log-probabilities."""
    from vllm import SamplingParams

    # Of one candidate: greedy, in the way that every configuration allows but drafting, where vLLM on CPU dies of a
    # top_k in a step without drafts.
    drafting = engine_client.vllm_config.speculative_config is not None
    greedy = {"temperature": 0.0} if drafting else {"temperature": 1.0, "top_k": 1}
    sampling = SamplingParams(max_tokens=1, logprobs=_TOP, ignore_eos=True, detokenize=False, **greedy)
    prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": uuid.uuid4().hex}
    request_id = f"be-serve-{uuid.uuid4().hex}"
    outputs = [one async for one in engine_client.generate(prompt, sampling, request_id, **options)]
    if not outputs or not outputs[-1].outputs[0].logprobs:
        raise IncompatibleVLLM("The engine gave no answer at start-up.")
    return {token: float(found.logprob) for token, found in outputs[-1].outputs[0].logprobs[0].items()}


async def write_rows(engine_client: Any, rows: list[int], vectors: Any) -> None:
    """Put vectors [n, hidden_size] in the serving dtype into rows of every worker."""
    import torch

    data = vectors.contiguous().view(torch.uint8).numpy().tobytes()
    if not all(await _on_every_engine(engine_client, "be_write_rows", rows, data, vectors.shape[1])):
        raise RowsBusy("The server sleeps, and takes no token into its memory; please try again when it is awake.")


def install_rows(state: Any, engine_client: Any) -> None:
    """Let ids of rows pass where a server process made them, and keep rows while a request may be embedded again."""
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
    """The outputs, with the rows held until the request is over: aborted on the engine, if the client went away.

    Held from here on, for a background response is generated when its HTTP request is over.
    """
    own, begun, loop = lease.renew(), [], asyncio.get_running_loop()

    async def held() -> Any:
        begun.append(True)
        try:
            async for output in outputs:
                yield output
        finally:
            try:
                await outputs.aclose()
                await asyncio.sleep(0)  # vLLM may have an abort of its own to send yet
            finally:
                own.release()

    made = held()

    def give_back() -> None:
        if not begun and not loop.is_closed():
            loop.call_soon_threadsafe(own.release)

    # A generator that was never begun runs no `finally`. Garbage may be collected in any thread.
    weakref.finalize(made, give_back)
    return made
