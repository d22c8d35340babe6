"""Soak test: overload a server for minutes; check answers, errors, attacks and memory.

Each token's vectors are the embedding rows of a short text. Stock vLLM's answer to the same text
as a plain system prompt is therefore the reference. The soak asks stock vLLM one request at a
time, before the load begins. Then many concurrent clients perform these actions:

    token     a chat with a token; the answer is compared
    plain     a chat with the plain text; the answer is compared
    long      a chat with a message of several KV blocks; the whole long answer is compared
    abort     a stream with a token, closed after the first event
    churn     register a token under a new id, chat (compared), remove the token, chat again (404)
    attack    try to read another token's row, vector or KV blocks (`ATTACKS`)

The server has fewer rows than the tokens need and a small KV cache, so that rows change owners
constantly and requests are preempted.
"""

from __future__ import annotations

from benchmarks.soak.options import SoakOptions
from benchmarks.soak.run import SoakRun, soak, summary

__all__ = ["SoakOptions", "SoakRun", "soak", "summary"]
