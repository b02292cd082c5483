"""Simulated: the workloads of the real servers of ``serve.py``, at what a step takes there.

Does the simulator foretell how the policies rank?

    python -m benchmark.scheduler.predict [--quick]
"""

from __future__ import annotations

from benchmark.scheduler import serve, simulate
from benchmark.serving import tiny
from benchmark.simulation.costs import GIB, CpuCosts
from benchmark.simulation.scenario import Contender, Scenario, main

MEMORY_GIB = serve.POOL_TOKENS * tiny.kv_bytes(serve.TP) / GIB
SCENARIOS = tuple(
    Scenario(name, workload, MEMORY_GIB, (serve.RANK,), CpuCosts(), serve.MAX_RUNNING)
    for name, workload in serve.scenarios(serve.SESSIONS).items()
)
SETTINGS = {
    "SIMULATED": "SGLang's and our own tree, allocator, admission and pools; a step as long as on the real servers",
    "workload": "that of the real servers; turns and answers are rounded up to 16 tokens",
}


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """Those of the real servers."""
    known = simulate.contenders(scenario)
    return {policy: known[policy] for policy in serve.POLICIES}


if __name__ == "__main__":
    main("scheduler_predicted", __doc__, SCENARIOS, contenders, SETTINGS)
