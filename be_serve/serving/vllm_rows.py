"""A server process's side of resident rows: opened, proven, written, held. For vLLM 0.32 and 0.33.

`vllm_engine` is the other side, in the workers.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from be_serve.serving.inject_resident_rows import RowIds
from be_serve.serving.rows import Lease
from be_serve.serving.vllm_compat import IncompatibleVLLM
from be_serve.serving.vllm_engine import PROBE_ROWS, ROWS_KEY

_ATTEMPTS = 3


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
    where something behind the engine may not tell the owners of a row apart.
    """
    config = engine_client.vllm_config
    if engine_client.model_config.enable_prompt_embeds:
        raise IncompatibleVLLM(
            "With resident rows the engine must take no embeddings, for clients could send their own: "
            "leave --enable-prompt-embeds out, or start the server with --be-injection prompt-embeds."
        )
    for option in ("speculative_config", "kv_transfer_config"):
        if getattr(config, option, None) is not None:
            raise IncompatibleVLLM(
                f"Resident rows are not safe beside --{option.replace('_', '-')}; "
                "start the server with --be-injection prompt-embeds."
            )
    answers = await engine_client.collective_rpc("be_rows_info")
    found = [answer for answer in answers if answer is not None]
    if not found or any(one["first"] != found[0]["first"] or not one["proven"] for one in found):
        raise IncompatibleVLLM(
            f"This model's input embedding cannot take rows for tokens ({found or 'it was not found'}); "
            "start the server with --be-injection prompt-embeds."
        )
    first, count = int(found[0]["first"]), int(found[0]["rows"])
    highest = state.online_renderer.renderer.get_tokenizer().max_token_id
    if highest >= first:
        raise IncompatibleVLLM(
            f"The tokenizer knows ids up to {highest}, the rows begin at {first}; "
            "start the server with --be-injection prompt-embeds."
        )
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


async def _prove_rows(engine_client: Any, first_probe: int) -> None:
    """Ask the engine the same thing in ordinary ids and through rows that hold those ids' embeddings."""
    vocabulary = engine_client.model_config.get_vocab_size()
    ids = [(i + 1) * vocabulary // (PROBE_ROWS + 2) for i in range(PROBE_ROWS)]
    await engine_client.collective_rpc("be_probe_rows", args=(ids,))
    rows = RowIds([ids[0]], [first_probe + i for i in range(len(ids))], [ids[-1]], lease=None)
    plain, resident = [await _greedy(engine_client, one) for one in ([ids[0], *ids, ids[-1]], rows)]
    if plain[0] != resident[0] or abs(plain[1] - resident[1]) > 0.01 * abs(plain[1]) + 0.01:
        raise IncompatibleVLLM(
            f"The engine answers rows otherwise than the same ids ({plain} against {resident}); "
            "start the server with --be-injection prompt-embeds."
        )


async def _greedy(engine_client: Any, ids: list[int]) -> tuple[list[int], float]:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, ignore_eos=True, detokenize=False)
    prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": uuid.uuid4().hex}
    outputs = [one async for one in engine_client.generate(prompt, sampling, f"be-serve-{uuid.uuid4().hex}")]
    if not outputs:
        raise IncompatibleVLLM("The engine gave no answer at start-up.")
    made = outputs[-1].outputs[0]
    return list(made.token_ids), float(made.cumulative_logprob)


async def write_rows(engine_client: Any, rows: list[int], vectors: Any) -> None:
    """Put vectors [n, hidden_size] in the serving dtype into rows of every worker."""
    import torch

    data = vectors.contiguous().view(torch.uint8).numpy().tobytes()
    await engine_client.collective_rpc("be_write_rows", args=(rows, data, vectors.shape[1]))


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


async def _leased(lease: Lease, outputs: Any) -> Any:
    """The outputs, with the rows held until the request is over: aborted on the engine, if the client went away."""
    lease = lease.renew()
    try:
        async for output in outputs:
            yield output
    finally:
        await outputs.aclose()
        lease.release()
