"""Bursts of concurrent chats at two servers in turns.

    plain        plugin   plain prompt of k tokens, tokens registered beside it
    be           plugin   the token in the prompt's place
    plain_other  other    the same chats as `plain`
    be_other     other    the same as `be`, where the other server has tokens too
    again_other  other    where it has none: `plain_other` once more

The other server is stock vLLM, to see what the plugin costs everybody else, or the plugin
with another injection, to compare the two; the same one shows what two equal servers differ by.

A burst is answered whole before the next begins; a server rests while the other is timed.
Both are asked equally often, and are started anew several times, in turns the one or the
other first: what a process got when it was started it keeps for as long as it lives, which no
number of bursts would average out. On a small virtual machine the server that was started
first was 3 to 10 % slower than its rival, whichever it was.

    options.py   what to measure, and on which servers
    figures.py   bursts -> all reported figures             pure
    chart.py     the picture
    workload.py  two servers of our own, and their clients
    run.py       starts, warm-up and timed rounds
"""

from __future__ import annotations

from benchmarks.load.options import LoadOptions
from benchmarks.load.run import LoadRun, measure_load

__all__ = ["LoadOptions", "LoadRun", "measure_load"]
