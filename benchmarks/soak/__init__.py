"""A long time at saturation: is every answer right, is anything lost, does memory stay flat?

Each token's vectors are the embedding rows of a short text, so the right answer is known
without the plugin: stock vLLM's, to the same text as a plain system prompt, asked one at
a time before the load begins. Then many clients at once do what clients do, for minutes:

    token     a chat with a token; its answer is compared
    plain     a chat with the plain text; compared
    long      either with a message of several blocks, to fill the KV cache; the whole long answer is compared
    abort     a token's stream, given up after its first event
    churn     register a token under a new id, ask it (compared), remove it, ask again (404)
    attack    reach for another's row, vector or KV blocks (`ATTACKS`)

The server is given fewer rows than the tokens need and a small KV cache, so that rows
change their owner all the time and requests are preempted.
"""

from __future__ import annotations

from benchmarks.soak.options import SoakOptions
from benchmarks.soak.run import SoakRun, soak, summary

__all__ = ["SoakOptions", "SoakRun", "soak", "summary"]
