"""OpenAI batch files: every row a request, every answer a row.

Answers are kept in a journal beside the output as they come, so the same call continues
after a stop, whatever stopped it. What is wrong with a row (400, 404, 413, 422) is its
answer; what is wrong with the server (busy, gone, a proxy's word) is waited for.
"""

from __future__ import annotations

from be_serve.batch.asking import connect, run_rows, served_models
from be_serve.batch.journal import Journal, check_output
from be_serve.batch.rows import URLS, BatchRow, read_rows
from be_serve.core.errors import BatchStopped

__all__ = [
    "URLS",
    "BatchRow",
    "BatchStopped",
    "Journal",
    "check_output",
    "connect",
    "read_rows",
    "run_rows",
    "served_models",
]
