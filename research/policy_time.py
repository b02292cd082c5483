"""Host time of ordering the waiting queue: the pure function, and the whole policy with its memory of last steps.

python research/policy_time.py
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np
from sglang_blocklora.scheduling.order import Waiting, order
from sglang_blocklora.scheduling.policy import AffinityPolicy


def queue(count: int, adapters: int, generator: np.random.Generator) -> Waiting:
    """``count`` requests over ``adapters`` adapters by Zipf, half of them resident, every tenth overdue."""
    ranks = np.arange(1, adapters + 1)
    owner = generator.choice(adapters, count, p=(1 / ranks) / (1 / ranks).sum())
    load = generator.choice([0.0, 80.0, 640.0], adapters, p=[0.5, 0.4, 0.1])
    return Waiting(
        owner,
        generator.integers(0, 3, count),
        generator.integers(0, 2000, count),
        load[owner],
        generator.integers(16, 1024, count),
        generator.integers(0, 200, count),
        generator.random(count) < 0.1,
        np.where(generator.random(count) < 0.1, 10**6, 0),
    )


def milliseconds(call, repeat: int) -> list[float]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=200)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    print(f"{platform.machine()}, numpy {np.__version__}, {options.adapters} adapters, ms, median (max)")
    for count in (128, 500, 2000, 8000):
        waiting = queue(count, options.adapters, generator)
        spent = generator.integers(0, 8192, options.adapters)
        quanta = np.full(options.adapters, 8192)
        pure = milliseconds(lambda w=waiting, s=spent, q=quanta: order(w, s, q, 10**6), options.repeat)

        policy = AffinityPolicy(10**6, 8192, {})
        tickets = [policy.ticket(str(owner)) for owner in waiting.owner]
        columns = (waiting.priority, waiting.prefix_tokens, waiting.load_tokens, waiting.cost_tokens, waiting.deferred)
        fields = [column.tolist() for column in columns]
        whole = milliseconds(lambda p=policy, t=tickets, f=fields: p.order(t, *f), options.repeat)
        cells = (f"{statistics.median(times):6.3f} ({max(times):6.3f})" for times in (pure, whole))
        print(f"{count:5d} waiting: order {next(cells)}   policy {next(cells)}")


if __name__ == "__main__":
    main()
