"""Runs OpenAI batch files: each input row is a request, each output row is its answer.

Every answer is written to a journal next to the output at once. After a stop of any kind, the same
call continues from the journal. If a row is wrong (400, 404, 413, 422), the error is its answer. If
the server is busy or away, the run waits for it.
"""

from __future__ import annotations

from be_serve.batch.client import connect, run_rows, served_models
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
