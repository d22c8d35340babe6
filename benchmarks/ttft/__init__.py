"""Time to first token of [BE], compared with no prompt, a plain k-token prompt and the full prompt.

run.py        options, servers and the whole benchmark
workload.py   arms: what each one sends, and to which server
rounds.py     warm-up and timed rounds
figures.py    samples -> reported figures (pure)
report.py     table, JSON and summary line
chart.py      the PNG
"""

from __future__ import annotations

from benchmarks.ttft.run import TTFTOptions, measure_ttft

__all__ = ["TTFTOptions", "measure_ttft"]
