"""Interleaved measurements of several servers, which every serving benchmark is made of.

Rounds run forth and back (A B B A), each pass under the same workload, every figure written as soon as it is there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmark.record import Recorder
from benchmark.serving import client
from benchmark.serving.fleet import Member
from benchmark.serving.workload import Workload

CHECKED_TOKENS = 12


@dataclass(frozen=True)
class Variant:
    """What is measured: a server of the fleet, and what its adapters are called, the most popular first."""

    server: str
    adapters: Sequence[str | None]


def interleave(
    recorder: Recorder,
    members: Mapping[str, Member],
    variants: Mapping[str, Variant],
    scenarios: Mapping[str, Workload],
    *,
    rounds: int,
    slo_ttft_s: float,
    slo_tpot_s: float = math.inf,
    adapter_bytes: Callable[[str], int] = lambda name: 0,
    warm_up: bool = True,
    check: Callable[[Member], None] = lambda member: None,
) -> None:
    """Play every scenario against every variant, ``rounds`` times.

    In a round all variants get the same sessions; another round has another seed. Before each pass the KV cache is
    flushed. ``adapter_bytes(name)``: bytes that bringing in that adapter copies on a TP rank. ``check`` is called with
    each server that has woken up.
    """
    for number in range(-1 if warm_up else 0, rounds):
        for variant in list(variants)[:: -1 if number % 2 else 1]:
            member, names = members[variants[variant].server], variants[variant].adapters
            with member.awake() as server:
                check(member)
                for scenario, workload in scenarios.items():
                    member.flush()
                    before = member.adapter_loads()
                    sessions = dataclasses.replace(workload, seed=workload.seed + max(number, 0)).generate()
                    label = f"round {number + 1} of {rounds}, {scenario}, {variant}"
                    figures = client.summary(
                        *client.play(server.url, sessions, names, label, member.launch.dialect), slo_ttft_s, slo_tpot_s
                    )
                    loads = member.adapter_loads() - before
                    figures["adapter_loads"] = loads.total()
                    figures["adapter_loads_per_request"] = loads.total() / figures["requests"]
                    figures["copied_mib"] = sum(adapter_bytes(name) * n for name, n in loads.items()) / 2**20
                    if number >= 0:
                        recorder.add(scenario, variant, number, figures)
                    print(
                        f"{label}: TTFT {figures['ttft_ms_p50']:.0f} ms, TPOT {figures['tpot_ms_p50']:.1f} ms",
                        flush=True,
                    )
