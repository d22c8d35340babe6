"""Load benchmark: bursts of concurrent chats to two servers in turn.

    plain        plugin   plain prompt of k tokens; tokens are registered but not used
    be           plugin   the token in place of the prompt
    plain_other  other    the same chats as `plain`
    be_other     other    the same chats as `be`, if the other server has the plugin
    again_other  other    `plain_other` a second time, if the other server is stock vLLM

The other server is stock vLLM or a second plugin server. Stock vLLM shows what the plugin costs
requests without a token. A second injection compares two injections. The same injection shows the
benchmark's own error.

A burst ends before the next burst begins. The idle server is suspended. Both servers get the same
number of bursts. Both are restarted several times, in alternating order, because a process keeps
the conditions of its start and more bursts cannot average them out. On a small virtual machine the
server that started first was 3 to 10 % slower, whichever server it was.

    options.py   options and arms
    figures.py   bursts -> reported figures (pure)
    chart.py     the PNG
    workload.py  the two servers, their clients and the bursts
    run.py       starts, warm-up and timed rounds
"""

from __future__ import annotations

from benchmarks.load.options import LoadOptions
from benchmarks.load.run import LoadRun, measure_load

__all__ = ["LoadOptions", "LoadRun", "measure_load"]
