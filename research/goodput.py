"""Simulated: which order serves most requests within limits of TTFT and TPOT? All in unified memory of 16 GiB.

SGLang's fcfs and lpm, and ours with other age bounds (``--adapter-max-wait-steps``) and other rounds of fairness
(``--adapter-round-chunks``). Every workload comes at about what a server can do, or at about a quarter more, for 30 s.

    python -m research.goodput near|beyond [--quick]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

from research.scheduler import ours, upstream
from research.simulation.scenario import Contender, Found, Scenario, experiment, multi_turn, single_turn
from research.simulation.systems import Unified

SEEDS = (0, 1)
SECONDS = 30  # of arrivals
MEMORY_GIB = 16
SHARED_TOKENS = 512  # of the prompt that begins every request
CLOSE = 0.97  # of the best counts as the best
TARGETS = ("goodput_share", "goodput_interactive_share")
TAIL = "ttft_p99_ms"
WORST_ADAPTER = "worst_adapter_ttft_p99_ms"
BASELINE = "fcfs"
UNBOUNDED = "lpm"


class Asked(NamedTuple):
    """A workload: ``conversations`` or single requests behind a shared prompt, and how many a second come."""

    adapters: int
    popularity: str
    conversations: bool
    near: float
    beyond: float


ASKED = (
    Asked(24, "zipf:1.0", True, 14, 18),
    Asked(24, "hot:0.5", True, 14, 18),
    Asked(64, "zipf:1.0", True, 10, 13),
    Asked(64, "zipf:0.5", True, 8, 10),
    Asked(200, "zipf:1.0", True, 7.5, 10),
    Asked(200, "zipf:0.5", True, 6.5, 9),
    Asked(24, "hot:0.5", False, 28, 36),
    Asked(64, "zipf:1.0", False, 20, 26),
    Asked(200, "zipf:0.5", False, 12, 16),
)


def scenario(asked: Asked, rate: float) -> Scenario:
    make = partial(multi_turn if asked.conversations else single_turn, adapters=asked.adapters, seconds=SECONDS)
    workload = make(rate) if asked.conversations else make(rate, asked.popularity)
    workload = replace(workload, popularity=asked.popularity, system_tokens=SHARED_TOKENS)
    kind = "conversations" if asked.conversations else "requests"
    return Scenario(f"{asked.adapters} adapters, {asked.popularity}, {rate:g} {kind}/s", workload, MEMORY_GIB)


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """SGLang's, and ours by age bound and rounds."""
    policies = {UNBOUNDED: upstream("lpm"), BASELINE: upstream("fcfs")}
    for steps, chunks in (*product((16, 64, 128), (16, 8, 4)), (256, 16)):
        policies[f"ours, {steps} steps, {chunks} chunks"] = ours(max_wait_steps=steps, round_chunks=chunks)
    return {name: Contender(Unified, policy) for name, policy in policies.items()}


def overall(found: Found) -> Found:
    """Over all workloads, seed by seed: how often an order is among the best, how far behind at worst, who waits.

    mean_...             over the workloads
    ..._close            share of workloads whose goodput is within 3 % of the best order's
    ..._least            the least goodput over the best order's
    worst_over_fcfs      the largest P99 TTFT over fcfs's, under which all wait alike
    adapter_over_lpm     the largest P99 TTFT of a workload's worst adapter over that under lpm, which bounds no wait
    """
    workloads: list[Mapping[str, Mapping[str, list[float]]]] = list(found.values())
    summary: dict[str, dict[str, list[float]]] = {}
    for name, figures in workloads[0].items():
        for seed in range(len(figures[TARGETS[0]])):
            row: dict[str, float] = {}
            for target in TARGETS:
                best = [max(one[target][seed] for one in orders.values()) for orders in workloads]
                over = [orders[name][target][seed] / most for orders, most in zip(workloads, best, strict=True) if most]
                row[f"{target}_close"] = sum(value >= CLOSE for value in over) / len(over)
                row[f"{target}_least"] = min(over)
            for figure in (*TARGETS, TAIL):
                row[f"mean_{figure}"] = statistics.fmean(orders[name][figure][seed] for orders in workloads)
            row["worst_over_fcfs"] = max(
                orders[name][TAIL][seed] / orders[BASELINE][TAIL][seed] for orders in workloads
            )
            row["adapter_over_lpm"] = max(
                orders[name][WORST_ADAPTER][seed] / orders[UNBOUNDED][WORST_ADAPTER][seed] for orders in workloads
            )
            for figure, value in row.items():
                summary.setdefault(name, {}).setdefault(figure, []).append(value)
    return {"all workloads": summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("near", "beyond"), help="of what a server can do")
    parser.add_argument("--quick", action="store_true", help="one seed and a fifth of the sessions, nothing recorded")
    options = parser.parse_args()
    scenarios = [scenario(asked, getattr(asked, options.load)) for asked in ASKED]
    experiment(f"goodput_{options.load}", scenarios, contenders, seeds=SEEDS, quick=options.quick, overall=overall)


if __name__ == "__main__":
    main()
