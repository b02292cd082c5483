"""Interleaved measurements of several servers, and the benchmark that needs nothing else: what LoRA costs in decode.

``interleave`` is what every serving benchmark calls: rounds run forth and back (A B B A), each pass under the same
workload, every figure written as soon as it is there.

    python -m benchmark.serving.runner [--tp 2] [--rank 16] [--rounds 6] [--tokens 64]

compares the base model on stock SGLang, stock LoRA (plain, rank r), and ours with the base model and with a
block-diagonal adapter matched in parameters (n = TP size); the base model is measured twice, which shows the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.record import Recorder
from benchmark.serving import client, tiny
from benchmark.serving.fleet import Launch, Member, check_tokens, fleet
from benchmark.serving.tiny import AdapterChoice
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
    adapter_bytes: Callable[[str], int] = lambda name: 0,
    warm_up: bool = True,
) -> None:
    """Play every scenario against every variant, ``rounds`` times.

    In a round all variants get the same sessions; another round has another seed. Before each pass the KV cache is
    flushed. ``adapter_bytes(name)``: bytes that bringing in that adapter copies on a TP rank.
    """
    for number in range(-1 if warm_up else 0, rounds):
        for variant in list(variants)[:: -1 if number % 2 else 1]:
            member, names = members[variants[variant].server], variants[variant].adapters
            with member.awake() as server:
                for scenario, workload in scenarios.items():
                    member.flush()
                    before = member.adapter_loads()
                    sessions = dataclasses.replace(workload, seed=workload.seed + max(number, 0)).generate()
                    label = f"round {number + 1} of {rounds}, {scenario}, {variant}"
                    figures = client.summary(*client.play(server.url, sessions, names, label), slo_ttft_s)
                    loads = member.adapter_loads() - before
                    figures["adapter_loads"] = loads.total()
                    figures["adapter_hit_rate"] = 1 - loads.total() / figures["requests"]
                    figures["copied_mib"] = sum(adapter_bytes(name) * n for name, n in loads.items()) / 2**20
                    if number >= 0:
                        recorder.add(scenario, variant, number, figures)
                    print(
                        f"{label}: TTFT {figures['ttft_ms_p50']:.0f} ms, TPOT {figures['tpot_ms_p50']:.1f} ms",
                        flush=True,
                    )


def variants_of_decode() -> dict[str, Variant]:
    return {
        "base": Variant("base", [None]),
        "stock LoRA": Variant("stock LoRA", ["plain"]),
        "ours, base model": Variant("ours", [None]),
        "ours, block-diagonal": Variant("ours", ["bd"]),
        "base again (noise)": Variant("base", [None]),
    }


def measure_decode(options: argparse.Namespace, folder: Path) -> None:
    """The decode benchmark, in an empty folder."""
    rank = tiny.matched_rank(options.rank, options.tp)
    choices = {"plain": AdapterChoice(rank=options.rank), "bd": AdapterChoice(options.tp, rank)}
    model, adapters = tiny.build(folder, choices)
    prompts, expected = tiny.prompts_and_answers(model, adapters, (32,), CHECKED_TOKENS)
    common = ("--tp", str(options.tp))
    plain = ("--lora-backend", "torch_native", *tiny.lora_paths({"plain": adapters["plain"]}))
    launches = {
        "base": Launch(True, common),
        "stock LoRA": Launch(True, (*common, *plain)),
        # Static: unified memory needs the radix cache, which is off so that every prompt is computed.
        "ours": Launch(False, (*common, "--adapter-memory", "static", *tiny.lora_paths({"bd": adapters["bd"]}))),
    }
    one = Workload(
        1,
        math.inf,
        1,
        "zipf:0",
        user_tokens=(32, 33),
        new_tokens=(options.tokens, options.tokens + 1),
        vocab=tiny.VOCAB,
    )
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": options.tp,
        "adapters": f"plain rank {options.rank}; block-diagonal rank {rank}, n = {options.tp}, no more parameters",
        "workload": f"prompts of 32 random tokens, {options.tokens} new tokens",
        "rounds": options.rounds,
    }
    with fleet(model, launches, folder) as members:
        check_tokens(members, {"base": [None], "stock LoRA": ["plain"], "ours": [None, "bd"]}, prompts, expected)
        recorder = Recorder("decode", one.seed, settings)
        scenarios = {"1 request": one, "8 requests at once": dataclasses.replace(one, sessions=8)}
        interleave(recorder, members, variants_of_decode(), scenarios, rounds=options.rounds, slo_ttft_s=1.0)
        recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="rank of the plain adapter")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a request")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure_decode(options, Path(folder))


if __name__ == "__main__":
    main()
