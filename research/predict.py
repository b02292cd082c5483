"""Simulated: the workloads of the real servers of ``benchmark/scheduler/serve.py``, at what a step takes there.

Does the simulator foretell how the policies rank?

Conversations of four times as many turns are played too: who waits longer where as many wait for longer?

    python -m research.predict [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmark.scheduler import serve
from benchmark.serving import tiny
from research import scheduler
from research.simulation.costs import GIB, CpuCosts
from research.simulation.policies import Policy
from research.simulation.scenario import Contender, Scenario, main
from research.simulation.systems import System, Unified

BOUNDS = tuple(f"adapter-affinity:{bound}" for bound in ("64:16", "128:16", "256:16"))
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
    return {policy: known.get(policy) or Contender(Unified, bounded(policy)) for policy in (*serve.POLICIES, *BOUNDS)}


def bounded(policy: str) -> Callable[[System], Policy]:
    """Ours with the age bound and the rounds that ``serve.launch`` reads from such a name."""
    _, steps, chunks = policy.split(":")
    return scheduler.ours(max_wait_steps=int(steps), round_chunks=int(chunks))


if __name__ == "__main__":
    main("scheduler_predicted", __doc__, SCENARIOS, contenders, SETTINGS)
