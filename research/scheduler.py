"""Simulated: in which order should requests of many adapters be admitted? All in unified memory of the same size.

SGLang's fcfs and lpm, S-LoRA's clustering by adapter, LoRAX's rotation of adapters, and ours.

    python -m research.scheduler [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from research.simulation.policies import Affinity, LoRAXRotation, Policy, SLoRACluster, Upstream
from research.simulation.scenario import Contender, Scenario, main, multi_turn, single_turn
from research.simulation.systems import System, Unified

SECONDS = 40  # of arrivals
one_turn = partial(single_turn, seconds=SECONDS)
turns = partial(multi_turn, seconds=SECONDS)

SCENARIOS = (
    Scenario("64 adapters, multi-turn, 10 sessions/s, 16 GiB", turns(10), 16),
    Scenario("S-LoRA alpha 1, 24 req/s, 16 GiB", one_turn(24, "slora:1.0"), 16),
    Scenario("S-LoRA alpha 1, 10 req/s, 12 GiB for 20 GiB of rank 64", one_turn(10, "slora:1.0"), 12, (64,)),
    Scenario("S-LoRA alpha 1, 12 req/s, 12 GiB for 20 GiB of rank 64", one_turn(12, "slora:1.0"), 12, (64,)),
    Scenario("S-LoRA alpha 1, 14 req/s, 12 GiB for 20 GiB of rank 64", one_turn(14, "slora:1.0"), 12, (64,)),
    Scenario("S-LoRA alpha 0.3, 34 req/s, 16 GiB", one_turn(34, "slora:0.3"), 16),
    Scenario("S-LoRA alpha 0.1, 44 req/s, 16 GiB", one_turn(44, "slora:0.1"), 16),
    Scenario("Zipf 1.0 in bursts (cv 4), 28 req/s, 16 GiB", one_turn(28, "zipf:1.0", 4.0), 16),
    Scenario("one hot (half) + 20 cold, 44 req/s, 16 GiB", one_turn(44, "hot:0.5", adapters=21), 16),
    Scenario("low load: 64 adapters, multi-turn, 4 sessions/s, 16 GiB", turns(4), 16),
)
ABLATED = (SCENARIOS[0], SCENARIOS[4], SCENARIOS[7])


def upstream(name: str) -> Callable[[System], Policy]:
    """SGLang's policy of that name."""
    return lambda system: Upstream(name, system.cache)


def ours(**constants: float) -> Callable[[System], Policy]:
    """Ours, with other constants than the default's (``Affinity``)."""
    return lambda system: Affinity(system.pool, system.cache, **constants)


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """The policies, all on the same memory; where it is telling, ours with another constant too."""
    policies = {
        "lpm": upstream("lpm"),
        "fcfs": upstream("fcfs"),
        "S-LoRA cluster": lambda system: SLoRACluster(),
        "LoRAX rotation": lambda system: LoRAXRotation(),
        "adapter-affinity": ours(),
    }
    if scenario.name in {ablated.name for ablated in ABLATED}:
        policies |= {
            "ours, overtaken 4 steps": ours(max_wait_steps=4),
            "ours, overtaken 16 steps": ours(max_wait_steps=16),
            "ours, overtaken 64 steps": ours(max_wait_steps=64),
            "ours, overtaken 256 steps": ours(max_wait_steps=256),
            "ours, rounds of one chunk": ours(round_chunks=1),
            "ours, rounds of 16 chunks": ours(round_chunks=16),
            "ours, 16 steps, 16 chunks": ours(max_wait_steps=16, round_chunks=16),
            "ours, any adapter joins a batch alike": ours(batch_tokens=0.0),
        }
    return {name: Contender(Unified, policy) for name, policy in policies.items()}


if __name__ == "__main__":
    main("scheduler_simulated", __doc__, SCENARIOS, contenders)
