"""Scarce memory: the same bytes on each TP rank for adapters and KV, in vLLM's slots, in stock's and in our one pool.

Adapters of ranks 8 to 64, of which vLLM and stock pad each to 64, conversations behind one system prompt. vLLM's number
of slots is swept, and so is that of fully sharded vLLM, whose slots are smaller: what more slots take is KV that is
missing, so the best one is what counts. Goodput is the share of requests within both limits. Only one server is up at a
time, since 24 GiB did not hold six of vLLM's beside the others.

    make .venv-vllm/.installed
    python -m benchmark.peers.scarce [--rates 1 2 3] [--laws zipf:0.5 zipf:1.0 hot:0.5] [--slots 4 8 12]
        [--sharded-slots 8 12] [--rounds 2]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmark.peers import vllm
from benchmark.record import Recorder
from benchmark.serving import tiny
from benchmark.serving.fleet import Engine, Launch, check_answers, visitors
from benchmark.serving.runner import CHECKED_TOKENS, Variant, interleave
from benchmark.serving.tiny import AdapterChoice
from benchmark.serving.workload import Workload

RANKS = (8, 16, 32, 64)
MAX_RUNNING = 16
PAGE = 32  # vLLM's blocks of KV: the fewest tokens that its CPU attention takes
MIB = 2**20
LIMITS = {"slo_ttft_s": 1.0, "slo_tpot_s": 0.15}


def launches(options: argparse.Namespace, paths: dict[str, Path], blocks: dict[str, Path]) -> dict[str, Engine]:
    """Every engine with ``options.mib`` for adapters and KV on a TP rank."""
    tp, total, slot = options.tp, options.mib * MIB, max(RANKS) * tiny.plain_bytes(options.tp)
    made: dict[str, Engine] = {}
    for slots in options.slots:
        made[f"vLLM, {slots} slots"] = vllm.VLLM(tp, vllm_flags(paths, slots, total - slots * slot))
    for slots in options.sharded_slots:
        kv = total - slots * max(RANKS) * tiny.plain_bytes(1) // tp  # both factors are split
        flags = (*vllm_flags(paths, slots, kv), "--fully-sharded-loras")
        made[f"vLLM fully sharded, {slots} slots"] = vllm.VLLM(tp, flags)
    common = ("--tp", str(tp), "--max-running-requests", str(MAX_RUNNING))
    stock = ("--lora-backend", "torch_native", "--max-loras-per-batch", str(options.stock_slots))
    tokens = (total - options.stock_slots * slot) // tiny.kv_bytes(tp)
    made["stock SGLang"] = Launch(True, (*common, *stock, "--max-total-tokens", str(tokens), *tiny.lora_paths(paths)))
    pool = ("--adapter-memory", "unified", "--max-total-tokens", str(total // tiny.kv_bytes(tp)))
    made["ours, plain"] = Launch(False, (*common, *pool, *tiny.lora_paths(paths)))
    made["ours, block-diagonal"] = Launch(False, (*common, *pool, *tiny.lora_paths(blocks)))
    return made


def vllm_flags(paths: dict[str, Path], slots: int, kv: int) -> tuple[str, ...]:
    """vLLM's flags for so many slots, and for ``kv`` bytes of KV on a TP rank."""
    flags = ("--dtype", "float32", "--max-model-len", "2048", "--block-size", str(PAGE), "--max-num-seqs")
    flags += (str(MAX_RUNNING), "--kv-cache-memory-bytes", str(kv), "--enable-lora", "--max-loras", str(slots))
    return (*flags, "--max-cpu-loras", str(len(paths)), "--max-lora-rank", str(max(RANKS)), *vllm.adapters(paths))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """The whole benchmark, in an empty folder."""
    ranks = {f"a{i}": RANKS[i % len(RANKS)] for i in range(options.adapters)}
    matched = {name: AdapterChoice(2, tiny.matched_rank(rank, 2)) for name, rank in ranks.items()}
    choices = {name: AdapterChoice(rank=rank) for name, rank in ranks.items()}
    model, made = tiny.build(folder, choices | {f"bd-{name}": choice for name, choice in matched.items()})
    paths, blocks = {name: made[name] for name in ranks}, {f"bd-{name}": made[f"bd-{name}"] for name in ranks}
    servers = launches(options, paths, blocks)
    variants = {name: Variant(name, list(blocks if "block" in name else paths)) for name in servers}
    workloads = {
        f"{law}, {rate:g} sessions/s": Workload(
            int(options.seconds * rate),
            rate,
            options.adapters,
            law,
            turns=(1, 4),
            user_tokens=(32, 97),
            new_tokens=(16, 33),
            system_tokens=128,
            think_s=1.0,
            vocab=tiny.VOCAB,
        )
        for law in options.laws
        for rate in options.rates
    }
    checked = {name: [*variants[name].adapters][: len(RANKS)] for name in servers}
    prompts, expected = tiny.prompts_and_answers(
        model, {name: made[name] for names in checked.values() for name in names}, (40,), CHECKED_TOKENS
    )
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": options.tp,
        "adapters": f"{options.adapters}, ranks {', '.join(map(str, RANKS))} in turn; block-diagonal ones no larger",
        "equal memory": f"{options.mib} MiB on each TP rank; a slot of rank {max(RANKS)} is "
        f"{max(RANKS) * tiny.plain_bytes(options.tp) / MIB:.2f} MiB, fully sharded "
        f"{max(RANKS) * tiny.plain_bytes(1) / options.tp / MIB:.2f} MiB, stock has {options.stock_slots}",
        "workload": f"{options.seconds:g} s of arrivals, 1 to 3 turns of 32 to 96 random tokens, answers of 16 to 32, "
        "system prompt of 128, 1 s mean think time",
        "limits": f"TTFT {LIMITS['slo_ttft_s']:g} s and TPOT {LIMITS['slo_tpot_s']:g} s",
        "rounds": options.rounds,
    }
    recorder = Recorder(options.part or f"peers_scarce_tp{options.tp}", 0, settings)
    interleave(
        recorder,
        visitors(model, servers, folder),
        variants,
        workloads,
        rounds=options.rounds,
        warm_up=False,  # the check is one
        check=lambda member: check_answers(member, checked[member.name], prompts, expected),
        **LIMITS,
    )
    recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--adapters", type=int, default=48)
    parser.add_argument("--mib", type=int, default=48, help="for adapters and KV, on each TP rank")
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 8, 12], help="2 were never the best")
    parser.add_argument("--sharded-slots", type=int, nargs="*", default=[8, 12], help="of fully sharded vLLM")
    parser.add_argument("--stock-slots", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 3])
    parser.add_argument("--laws", nargs="+", default=["zipf:1.0"])
    parser.add_argument("--seconds", type=float, default=15, help="of arrivals in each scenario")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", help="of the results, default peers_scarce_tp<tp>")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
