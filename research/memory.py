"""Simulated: where should adapters live? In stock SGLang's slots, an arena apart from the KV cache, or one memory.

All get the same bytes of one GPU for adapters and KV; the queue is first come, first served.

    python -m research.memory [--quick]
"""

from __future__ import annotations

from functools import partial

from sglang_blocklora.memory.eviction import STRATEGIES

from research.simulation.costs import GIB, Costs
from research.simulation.policies import Policy, Upstream
from research.simulation.scenario import Contender, Scenario, main, multi_turn, single_turn
from research.simulation.systems import STOCK_SLOTS, Static, StockSlots, System, Unified

BASELINE = f"stock, {STOCK_SLOTS} slots"

SCENARIOS = (
    # adapters exceed stock's slots 8 times
    Scenario("64 adapters, multi-turn, 6 sessions/s, 32 GiB", multi_turn(6), 32),
    Scenario("64 adapters, multi-turn, 2 sessions/s, 32 GiB", multi_turn(2), 32),
    Scenario("64 adapters, multi-turn, 4 sessions/s, 16 GiB", multi_turn(4), 16),
    Scenario("64 adapters, multi-turn, 6 sessions/s, 16 GiB", multi_turn(6), 16),
    Scenario("64 adapters, multi-turn, 4 sessions/s, 16 GiB, all of rank 64", multi_turn(4), 16, (64,)),
    # other workloads
    Scenario("S-LoRA alpha 0.1, 10 req/s, 16 GiB", single_turn(10, "slora:0.1"), 16),
    Scenario("S-LoRA alpha 0.3, 10 req/s, 16 GiB", single_turn(10, "slora:0.3"), 16),
    Scenario("S-LoRA alpha 1, 10 req/s, 16 GiB", single_turn(10, "slora:1.0"), 16),
    Scenario("Zipf 1.0 in bursts (cv 4), 10 req/s, 16 GiB", single_turn(10, "zipf:1.0", 4.0), 16),
    Scenario("64 adapters of rank 64, S-LoRA alpha 1, 6 req/s, 16 GiB", single_turn(6, "slora:1.0"), 16, (64,)),
    Scenario("one hot (half) + 20 cold, 10 req/s, 16 GiB", single_turn(10, "hot:0.5", adapters=21), 16),
    # adapters fit stock's slots
    Scenario("8 adapters, multi-turn, 4 sessions/s, 16 GiB", multi_turn(4, STOCK_SLOTS), 16),
    Scenario("8 adapters, multi-turn, 8 sessions/s, 16 GiB", multi_turn(8, STOCK_SLOTS), 16),
    Scenario("8 adapters of rank 64, multi-turn, 8 sessions/s, 16 GiB", multi_turn(8, STOCK_SLOTS), 16, (64,)),
    Scenario(
        "8 adapters of rank 64, S-LoRA alpha 1, 10 req/s, 16 GiB",
        single_turn(10, "slora:1.0", adapters=STOCK_SLOTS),
        16,
        (64,),
    ),
)


def _fcfs(system: System) -> Policy:
    return Upstream("fcfs", system.cache)


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """Stock with a slot for every adapter too, where that leaves at least a third of the memory to KV."""
    costs, count = Costs(), scenario.workload.adapters
    padded_bytes = count * costs.model.adapter_slots(max(scenario.ranks)) * costs.model.slot_bytes
    found = {BASELINE: Contender(StockSlots, _fcfs)}
    if count > STOCK_SLOTS and padded_bytes < scenario.memory_gib * GIB * 2 / 3:
        found[f"stock, {count} slots"] = Contender(partial(StockSlots, adapter_slots=count), _fcfs)
    found["static"] = Contender(Static, _fcfs)
    for name in STRATEGIES:
        found[f"unified, {name}"] = Contender(partial(Unified, eviction=name), _fcfs)
    return found


if __name__ == "__main__":
    main("memory_simulated", __doc__, SCENARIOS, contenders)
