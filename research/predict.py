"""Simulated: the workloads of the real servers of ``benchmark/scheduler/serve.py``, at what a step takes there.

Does the simulator foretell how the policies rank?

Conversations of four times as many turns are played too: who waits longer where as many wait for longer?

    python -m research.predict [--quick]
"""

from __future__ import annotations

from dataclasses import replace

from benchmark.scheduler import serve
from benchmark.serving import tiny
from research import scheduler
from research.simulation.costs import GIB, CpuCosts
from research.simulation.scenario import Contender, Scenario, main
from research.simulation.systems import Unified

SWEPT = tuple(f"adapter-affinity:{steps}:16" for steps in (16, 64, 128, 256))
MEMORY_GIB = serve.POOL_TOKENS * tiny.kv_bytes(serve.TP) / GIB
WORKLOADS = serve.scenarios(serve.SESSIONS)
LONGER = {f"{name}, four times as long": replace(played, turns=(12, 28)) for name, played in WORKLOADS.items()}
SCENARIOS = tuple(
    Scenario(name, workload, MEMORY_GIB, (serve.RANK,), CpuCosts(), serve.MAX_RUNNING)
    for name, workload in (WORKLOADS | LONGER).items()
)
SETTINGS = {
    "SIMULATED": "SGLang's and our own tree, allocator, admission and pools; a step as long as on the real servers",
    "workload": "that of the real servers; turns and answers are rounded up to 16 tokens",
}


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """Those of the real servers."""
    known = scheduler.contenders(scenario)
    swept = {policy: Contender(Unified, scheduler.ours(**serve.read(policy)[1])) for policy in SWEPT}
    return {policy: (known | swept)[policy] for policy in (*serve.POLICIES, *SWEPT)}


if __name__ == "__main__":
    main("scheduler_predicted", __doc__, SCENARIOS, contenders, SETTINGS)
