"""Equal memory on a real server: SGLang's padded adapter slots, our arena, and adapters in the KV cache's own slots.

64 plain adapters of ranks 4, 8 and 16, Zipf 1.0, conversations with a shared system prompt. Every server has the same
bytes on each TP rank for adapters and KV together:

    stock    8 slots padded to rank 16, and ``--kv-tokens`` tokens of KV
    static   an arena of those bytes (rounded up to MiB, taken from the KV), and the same KV
    unified  one pool of all of it

A second workload asks 8 adapters only, so that they fit everywhere.

    python -m benchmark.memory.serve [--rounds 2] [--sessions 48] [--rate 5] [--strategies cost-aware]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sglang_blocklora.memory.eviction import DEFAULT_STRATEGY, STRATEGIES

from benchmark.record import Recorder
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import CHECKED_TOKENS, Variant, interleave
from benchmark.serving.tiny import AdapterChoice
from benchmark.serving.workload import Workload

TP = 2
STOCK_SLOTS = 8
RANKS = (4, 8, 16)
MAX_RUNNING = 32
MIB = 2**20


@dataclass(frozen=True)
class EqualMemory:
    """The same bytes on a TP rank, as each server's flags say it."""

    kv_tokens: int

    @property
    def slots_bytes(self) -> int:
        """Stock's slots, each padded to the largest rank."""
        return STOCK_SLOTS * max(RANKS) * tiny.plain_bytes(TP)

    @property
    def total_bytes(self) -> int:
        return self.slots_bytes + self.kv_tokens * tiny.kv_bytes(TP)

    @property
    def arena_mib(self) -> int:
        """Static: the arena's flag is in MiB, rounded up."""
        return -(-self.slots_bytes // MIB)

    @property
    def static_tokens(self) -> int:
        """Static: what the rounding took is taken off its KV."""
        return (self.total_bytes - self.arena_mib * MIB) // tiny.kv_bytes(TP)

    @property
    def unified_tokens(self) -> int:
        return self.total_bytes // tiny.kv_bytes(TP)

    def __str__(self) -> str:
        return (
            f"{self.total_bytes / MIB:.1f} MiB on each TP rank: stock {STOCK_SLOTS} slots of rank {max(RANKS)} "
            f"({self.slots_bytes / MIB:.1f} MiB) and {self.kv_tokens} KV tokens, static {self.arena_mib} MiB and "
            f"{self.static_tokens}, unified {self.unified_tokens} slots"
        )


def launches(memory: EqualMemory, strategies: list[str], paths: tuple[str, ...]) -> dict[str, Launch]:
    """A server for each way to use the memory."""
    common = ("--tp", str(TP), "--max-running-requests", str(MAX_RUNNING), "--schedule-policy", "fcfs", *paths)
    stock = ("--lora-backend", "torch_native", "--max-loras-per-batch", str(STOCK_SLOTS))
    static = ("--adapter-memory", "static", "--adapter-memory-mb", str(memory.arena_mib))
    made = {
        "stock slots": Launch(True, (*common, *stock, "--max-total-tokens", str(memory.kv_tokens))),
        "static": Launch(False, (*common, *static, "--max-total-tokens", str(memory.static_tokens))),
    }
    for strategy in strategies:
        unified = ("--adapter-memory", "unified", "--adapter-eviction", strategy)
        flags = (*common, *unified, "--max-total-tokens", str(memory.unified_tokens))
        made[f"unified, {strategy}"] = Launch(False, flags)
    return made


def scenarios(options: argparse.Namespace) -> dict[str, Workload]:
    """More adapters than slots, and as many as slots."""
    many = Workload(
        options.sessions,
        options.rate,
        options.adapters,
        "zipf:1.0",
        turns=(1, 4),
        user_tokens=(16, 49),
        new_tokens=(16, 33),
        system_tokens=96,
        think_s=1.0,
        vocab=tiny.VOCAB,
    )
    few = dataclasses.replace(many, adapters=STOCK_SLOTS, sessions=options.sessions // 3)
    return {f"{options.adapters} adapters": many, f"{STOCK_SLOTS} adapters (they fit)": few}


def measure(options: argparse.Namespace, folder: Path) -> None:
    """The whole benchmark, in an empty folder."""
    memory = EqualMemory(options.kv_tokens)
    ranks = {f"a{i}": RANKS[i % len(RANKS)] for i in range(options.adapters)}
    model, adapters = tiny.build(folder, {name: AdapterChoice(rank=rank) for name, rank in ranks.items()})
    checked = {name: adapters[name] for name in list(adapters)[: len(RANKS)]}
    prompts, expected = tiny.prompts_and_answers(model, checked, (40,), CHECKED_TOKENS)
    servers = launches(memory, options.strategies, tiny.lora_paths(adapters))
    workloads = scenarios(options)
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": TP,
        "adapters": f"{options.adapters} plain, ranks {', '.join(map(str, RANKS))} in turn",
        "equal memory": str(memory),
        "workload": f"Zipf 1.0; {options.rate:g} sessions/s, {options.sessions} and {options.sessions // 3} of them; "
        "1 to 3 turns of 16 to 48 random tokens, answers of 16 to 32, system prompt of 96, 1 s mean think time",
        "rounds": options.rounds,
    }
    with fleet(model, servers, folder) as members:
        check_tokens(members, {name: list(checked) for name in members}, prompts, expected)
        recorder = Recorder("memory", 0, settings)
        interleave(
            recorder,
            members,
            {name: Variant(name, list(adapters)) for name in members},
            workloads,
            rounds=options.rounds,
            slo_ttft_s=options.slo_ttft_s,
            adapter_bytes=lambda name: ranks[name] * tiny.plain_bytes(TP),
            warm_up=False,  # the token check was one
        )
        recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=[DEFAULT_STRATEGY])
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--kv-tokens", type=int, default=4096, help="KV tokens that the stock server has")
    parser.add_argument("--sessions", type=int, default=48)
    parser.add_argument("--rate", type=float, default=5.0, help="sessions per second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slo-ttft-s", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
