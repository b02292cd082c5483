"""Sets the clocks of TP rank 1 an hour ahead, where they run three times as fast.

They go wrong once the scheduler is made, before it takes its first request.
"""

from __future__ import annotations

import functools
import time

SKEWED = "the clocks of TP rank 1 are skewed"
CLOCKS = {
    "time": 1,
    "monotonic": 1,
    "perf_counter": 1,
    "time_ns": 10**9,
    "monotonic_ns": 10**9,
    "perf_counter_ns": 10**9,
}


def skew_clocks() -> None:
    def skewed(clock, unit):
        start = clock()
        return lambda: start + 3600 * unit + 3 * (clock() - start)

    for name, unit in CLOCKS.items():
        setattr(time, name, skewed(getattr(time, name), unit))


def skew_rank_1() -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.runtime_context import get_parallel

    original = Scheduler.__init__

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if get_parallel().tp_rank == 1:
            skew_clocks()
            print(SKEWED, flush=True)

    Scheduler.__init__ = init
