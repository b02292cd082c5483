"""Simulated: one context asked of five adapters at once, plain ones or activated ones, in the same memory.

What sharing the context is worth under load, and whether an order of the queue that sees it is worth anything.

    python -m research.activated [--quick]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from research.simulation.costs import Costs
from research.simulation.policies import Affinity, Upstream
from research.simulation.scenario import SETTINGS, Contender, Scenario, main
from research.simulation.systems import Adapter, System, Unified
from research.simulation.traffic import INVOCATION, Judged, page_keys

ASKED = 5
SECONDS = 60  # of arrivals
RANKS = (16,)
WORKLOAD = {
    "adapters": f"{ASKED}, all linears, rank {RANKS[0]}, plain or activated",
    "workload": f"{SECONDS} s of contexts, Poisson; {ASKED} requests at once about each: context, invocation of 16 "
    "tokens, question of 16 to 128 random ones, answer of 16 to 64",
}


def judged(rate: float, tokens: tuple[int, int]) -> Judged:
    return Judged(int(rate * SECONDS) * ASKED, rate, ASKED, tokens)


SCENARIOS = (
    Scenario("contexts of 2,048 tokens, 1 a second, 16 GiB", judged(1, (2048, 2049)), 16, RANKS),
    Scenario("contexts of 2,048 tokens, 4 a second, 16 GiB", judged(4, (2048, 2049)), 16, RANKS),
    Scenario("contexts of 2,048 to 8,192 tokens, 1 a second, 16 GiB", judged(1, (2048, 8193)), 16, RANKS),
    Scenario("contexts of 2,048 to 8,192 tokens, 3 a second, 16 GiB", judged(3, (2048, 8193)), 16, RANKS),
)


def _activated(adapters: Sequence[Adapter], total_slots: int, costs: Costs) -> System:
    invocation = tuple(page_keys(INVOCATION))
    return Unified([replace(adapter, invocation=invocation) for adapter in adapters], total_slots, costs)


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """Plain adapters, and activated ones under orders that see nothing, what is cached, and what is shared too."""
    return {
        "plain": Contender(Unified, lambda system: Affinity(system.pool, system.cache)),
        "activated, fcfs": Contender(_activated, lambda system: Upstream("fcfs", system.cache)),
        "activated, lpm": Contender(_activated, lambda system: Upstream("lpm", system.cache)),
        "activated": Contender(_activated, lambda system: Affinity(system.pool, system.cache)),
    }


if __name__ == "__main__":
    main("activated_simulated", __doc__, SCENARIOS, contenders, SETTINGS | WORKLOAD)
