"""Time to first token: [BE] beside no prompt, a plain k-token prompt and the full prompt, cold and cached.

run.py        what to measure, on which servers; puts it together
workload.py   the arms: what each sends, and where to
rounds.py     warm-up and timed rounds
figures.py    samples -> all reported figures             pure
report.py     table, JSON, summary line
chart.py      the picture
"""

from __future__ import annotations

from benchmarks.ttft.run import TTFTOptions, measure_ttft

__all__ = ["TTFTOptions", "measure_ttft"]
