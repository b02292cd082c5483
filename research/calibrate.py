"""What a step takes on this machine: the constants of ``CpuCosts``.

    python -m research.calibrate [--rounds 5]

The server is that of ``benchmark/scheduler/serve.py``. Everything is seen from the client: a step is the median gap
between tokens, a prompt the time to its first token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmark.scheduler.serve import build, launch
from benchmark.serving import client, tiny
from benchmark.serving.fleet import fleet
from benchmark.serving.workload import Session, Turn

SHORT, LONG = 16, 528  # prompt tokens
NEW_TOKENS = 24
TOGETHER = 8


def at_once(requests: int, adapters: int, prompt: int, seed: int) -> list[Session]:
    """Requests that arrive together, the adapters taking turns; no two share a token by chance."""
    tokens = np.random.default_rng([seed, requests, adapters, prompt]).integers(tiny.VOCAB, size=(requests, prompt))
    return [Session(0.0, i % adapters, (Turn(tokens[i], NEW_TOKENS, 0.0),)) for i in range(requests)]


def figures(url: str, names: Sequence[str | None], sessions: list[Session]) -> dict[str, float]:
    """Of one pass, in milliseconds."""
    return client.summary(*client.play(url, sessions, names, "calibrating"), slo_ttft_s=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cases = {
        "one": (1, 1, SHORT),
        "together": (TOGETHER, 1, SHORT),
        "adapters": (TOGETHER, TOGETHER, SHORT),
        "long": (1, 1, LONG),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        model, adapters = build(Path(folder))
        servers = {"fcfs": launch(adapters, "fcfs")}
        with fleet(model, servers, Path(folder)) as members, members["fcfs"].awake() as running:
            for number in range(-1, options.rounds):  # the first warms up
                for name, case in cases.items():
                    made = figures(running.url, list(adapters), at_once(*case, seed=number + 1))
                    if number >= 0:
                        found[name].append(made)
    step = {name: statistics.median(made["itl_ms_p50"] for made in rounds) for name, rounds in found.items()}
    first = {name: statistics.median(made["ttft_ms_p50"] for made in rounds) for name, rounds in found.items()}
    request_ms = (step["together"] - step["one"]) / (TOGETHER - 1)
    adapter_ms = (step["adapters"] - step["together"]) / (TOGETHER - 1)
    print(f"a step                       {step['one'] - request_ms - adapter_ms:.2f} ms")
    print(f"a request in it              {request_ms:.2f} ms")
    print(f"an adapter in it             {adapter_ms:.2f} ms")
    print(f"a token of a prompt          {(first['long'] - first['one']) / (LONG - SHORT):.3f} ms")


if __name__ == "__main__":
    main()
