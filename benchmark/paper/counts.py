"""(a) What each layout adds to a decode forward: counted on running TP ranks, computed for models that are served.

Counted: real servers on a small Llama (2 layers, GQA), every torch.distributed call and every matrix product of every
rank. The counts must equal what ``shardings.py`` computes for that model, or the program stops; the same computation
then gives the figures of Llama-3.1-8B and 70B, Qwen3-30B-A3B and Mixtral-8x7B. So collectives and bytes exchanged are
counted for stock SGLang and for ours, their scaling is computed. vLLM's rows and those with experts are computed only.

    python -m benchmark.paper.counts [--tp 2]        (--tp 2 4 8 takes some minutes on two cores)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from blocklora_testing import collectives
from blocklora_testing.models import AdapterChoice, build_adapters, build_model
from blocklora_testing.server import running
from sglang_blocklora.tools.base_model import BaseSizes

from benchmark.paper.shardings import (
    EXPERTS,
    LLAMA,
    Cost,
    Sharding,
    lora_cost,
    matched_rank,
    parameters,
    served,
    sources,
)
from benchmark.record import REPOSITORY, Recorder
from benchmark.serving import fleet

SMALL = BaseSizes(hidden=256, intermediate=512, heads=16, kv_heads=8, head_dim=16, layers=2, vocab=256)
RANK = 16
INSTALLED: Sharding = "stock" if version("sglang") == "0.5.21" else "stock-0.5.23"
OURS = str(Path(__file__).with_name("s_lora") / "launcher.py")
STOCK = str(Path(__file__).with_name("counting_stock.py"))
# What can be run here, and the adapter that shows it.
ADAPTER: Mapping[Sharding, str] = {INSTALLED: "plain", "s-lora": "plain", "block-diagonal": "bd"}
NEW_TOKENS = 4


def decode_lines(log: Path) -> list[dict]:
    """Decode forwards of a single request."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["mode"] == "DECODE" and line["tokens"] == 1]


def forwards(lines: list[dict], rank: int, adapter: str | None) -> list[dict]:
    """A TP rank's decode forwards of the request under ``adapter`` (None: the base model), in order."""
    names = [adapter] if adapter else []
    return [line for line in lines if line["rank"] == rank and line["names"] == names][: NEW_TOKENS - 1]


def count(lines: list[dict], adapter: str | None, base_lines: list[dict], tp: int) -> Cost:
    """What a request under ``adapter`` adds to a forward of the base model; all ranks must exchange the same.

    base_lines  of a server whose base-model requests cost what they cost without LoRA: ours
    Matrix products depend on the position in the answer (attention), so forwards are compared in order.
    """
    costs = []
    for rank in range(tp):
        adapted, base = forwards(lines, rank, adapter), forwards(base_lines, rank, None)
        added = {json.dumps(_difference(a, b)) for a, b in zip(adapted, base, strict=True)}
        if len(added) != 1:
            raise SystemExit(f"TP rank {rank} exchanges other things in other forwards: {added}")
        costs.append(json.loads(added.pop()))
    if any(cost[:4] != costs[0][:4] for cost in costs):
        raise SystemExit(f"TP ranks exchange different things: {costs}")
    gathers, reduces, gather_bytes, reduce_bytes = costs[0][:4]
    sent = (tp - 1) * gather_bytes + 2 * (tp - 1) * reduce_bytes // tp
    return Cost(gathers, reduces, gather_bytes, reduce_bytes, sent, 0, 0, max(cost[4] for cost in costs))


def _difference(adapted: dict, base: dict) -> list[int]:
    calls = Counter(adapted["calls"])
    calls.subtract(base["calls"])
    put_in = Counter(adapted["input_bytes"])
    put_in.subtract(base["input_bytes"])
    gathers = [name for name in calls if "all_gather" in name]
    others = {name: n for name, n in calls.items() if n and name not in gathers and name != "all_reduce"}
    if others:
        raise SystemExit(f"unexpected collectives: {others}")
    sums = [sum(table[name] for name in gathers) for table in (calls, put_in)]
    return [sums[0], calls["all_reduce"], sums[1], put_in["all_reduce"], adapted["flops"] - base["flops"]]


def measure(model: Path, adapters: Mapping[str, Path], tp: int, folder: Path) -> tuple[dict[Sharding, Cost], Cost]:
    """Counts of the three shardings from a stock server and from one of ours that holds both kinds of adapter.

    The second value: what stock SGLang adds to requests of the base model once LoRA is on.
    """
    lines: dict[str, list[dict]] = {}
    for name, module, flags, loaded in (
        ("stock", STOCK, ("--lora-backend", "torch_native"), ("plain",)),
        ("ours", OURS, ("--adapter-memory", "static"), ("plain", "bd")),
    ):
        print(f"TP {tp}: counting on {name}", flush=True)
        log = folder / f"{name}-{tp}.jsonl"
        environment = collectives.environment(log) | {"COUNT_FLOPS": "1"}
        environment["PYTHONPATH"] += f":{REPOSITORY}"
        paths = ["--lora-paths", *(f"{key}={adapters[key]}" for key in loaded)]
        common = ("--tp", str(tp), "--disable-radix-cache", *flags, *paths)
        with running(
            model, *common, log=folder / f"{name}-{tp}.log", environment=environment, module=(module,)
        ) as server:
            log.unlink()  # the warm-up's
            try:
                for adapter in (None, *loaded):
                    server.tokens([1, 2, 3, 4, 5], adapter, NEW_TOKENS)
            except OSError as error:
                raise SystemExit(f"{name} did not answer ({error}):\n{server.log_text()[-4000:]}") from error
        lines[name] = decode_lines(log)
    of = {sharding: lines["stock" if sharding == INSTALLED else "ours"] for sharding in ADAPTER}
    costs = {sharding: count(of[sharding], adapter, lines["ours"], tp) for sharding, adapter in ADAPTER.items()}
    return costs, count(lines["stock"], None, lines["ours"], tp)


def check(counted: Cost, computed: Cost, what: str) -> None:
    """``SystemExit`` unless what ranks exchanged and multiplied is what was computed."""
    counters = [field.name for field in dataclasses.fields(Cost) if field.name not in ("adapter_bytes", "read_bytes")]
    for name in counters:
        if getattr(counted, name) != getattr(computed, name):
            raise SystemExit(f"{what}: {name} counted {getattr(counted, name)}, computed {getattr(computed, name)}")


def ranks_of(base: BaseSizes, sharding: Sharding, tp: int) -> dict[str, int]:
    """Label -> LoRA rank: the plain rank, and for block-diagonal the matched one and multiples of the plain one."""
    if sharding != "block-diagonal":
        return {"r": RANK}
    return {"r": RANK, "2r": 2 * RANK, "4r": 4 * RANK, "matched": matched_rank(base, RANK, tp)}


def record(
    recorder: Recorder, scenario: str, base: BaseSizes, tp: int, sharding: Sharding, label: str, cost: Cost
) -> None:
    """One row: a sharding at one rank."""
    rank = ranks_of(base, sharding, tp)[label]
    relative = parameters(base, rank, tp if sharding == "block-diagonal" else 1) / parameters(base, RANK)
    figures = dataclasses.asdict(cost) | {"lora_rank": rank, "parameters_over_plain": relative}
    recorder.add(scenario, f"{sharding}, {label}", 0, figures)
    print(
        f"{scenario:28} {sharding:14} {label:8} rank {rank:3} {cost.all_gathers:4} all-gathers {cost.all_reduces:4} "
        f"all-reduces {cost.sent_bytes:7} B sent {cost.adapter_bytes / 2**20:8.2f} MiB {cost.flops / 1e6:8.2f} MFLOP"
    )


def count_on_ranks(tp: int, folder: Path) -> None:
    """Count at one TP size, check against the computation, record."""
    settings = {
        "model": f"{SMALL.layers} Llama layers, hidden {SMALL.hidden}, {SMALL.heads} + {SMALL.kv_heads} heads, float32",
        "counted": f"on {tp} running TP ranks of stock SGLang and of ours: one request, r = {RANK}; "
        "collectives, bytes exchanged and FLOPs of matrix products are counted, adapter bytes computed",
        "per": "decode forward and TP rank, added to the base model's own; bytes sent by ring algorithms",
    }
    recorder = Recorder(f"counts_tp{tp}", 0, settings)
    sizes = dataclasses.asdict(SMALL)
    model = build_model(
        folder / "model",
        "llama",
        **{key: sizes[key] for key in ("heads", "kv_heads", "head_dim", "layers")},
        hidden_size=SMALL.hidden,
        intermediate_size=SMALL.intermediate,
    )
    choices = {"plain": AdapterChoice(rank=RANK), "bd": AdapterChoice(tp, matched_rank(SMALL, RANK, tp))}
    adapters = build_adapters(model, folder / "adapters", choices)
    costs, idle = measure(model, adapters, tp, folder)
    for sharding, counted in costs.items():
        label = "matched" if sharding == "block-diagonal" else "r"
        computed = lora_cost(SMALL, sharding, ranks_of(SMALL, sharding, tp)[label], tp, 1, torch.float32)
        check(counted, computed, f"TP {tp}, {sharding}")
        counted = dataclasses.replace(counted, adapter_bytes=computed.adapter_bytes, read_bytes=computed.read_bytes)
        record(recorder, f"Counted at TP {tp}", SMALL, tp, sharding, label, counted)
    recorder.add(f"Counted at TP {tp}", f"{INSTALLED}, base-model request", 0, dataclasses.asdict(idle))
    print(f"{INSTALLED}, base-model request: {idle}")
    recorder.finish()


def compute() -> None:
    """The large models at one plain rank, by the same computation."""
    settings = {
        "computed": "by the planner that serves adapters; stock SGLang, S-LoRA's sharding and ours checked on ranks of "
        f"a small model, the others by their code: {sources()}; r = {RANK}, bfloat16",
        "per": "decode forward of one token and TP rank, added to the base model's own; bytes sent by ring algorithms",
    }
    recorder = Recorder("counts", 0, settings)
    for name, base in (LLAMA | EXPERTS).items():
        for tp in (1, 2, 4, 8):
            for sharding in served(base):
                for label, rank in ranks_of(base, sharding, tp).items():
                    cost = lora_cost(base, sharding, rank, tp, 1, torch.bfloat16)
                    record(recorder, f"{name}, TP {tp}", base, tp, sharding, label, cost)
    recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="*", default=[2], help="TP sizes to count on running ranks")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, fleet.stop_cleanly)
    for tp in options.tp:
        with tempfile.TemporaryDirectory() as name:
            count_on_ranks(tp, Path(name))
    compute()


if __name__ == "__main__":
    main()
