"""Decode on 8 x A100 and 8 x H100 by a small cost model, beside the figures that the paper reports.

No GPU is used and nothing is fitted: every constant below is a published measurement or specification with its source,
and the paper's four speed-ups are only compared with. A step of one token and TP rank costs

    base  = weights / bandwidth + 2 layers * all-reduce + kernels of the base model * start of a kernel
    LoRA  = adapter bytes / bandwidth + 8 layers * start of a kernel (shrink and expand of four linears)
            + all-gathers * their time + all-reduces * theirs + bytes sent / NVLink

with the collectives, bytes sent and adapter bytes of ``benchmark/paper/shardings.py``, which ``counts.py`` beside it
checks against real ranks.
Left out: attention's reads of the KV cache, the scheduler, prefill. These slow every variant alike, so they would pull
the predicted ratios towards 1.

    python -m research.cost_model
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from sglang_blocklora.tools.base_model import BaseSizes

from benchmark.paper.shardings import LLAMA, Sharding, lora_cost, modules_of, parameters
from benchmark.record import REPOSITORY, Recorder
from research.sections import RESULTS

TP = 8
# Assumed: two norms, rotary embedding, attention in two kernels, KV write, activation and four GEMMs a Llama layer.
BASE_KERNELS = 11
LORA_KERNELS = 8
# Ranks at which the paper says it trained ("ranks 16 to 512"); which one its "up to" belongs to is not known to us.
PLAIN_RANKS = (16, 256)
BATCHES = (1, 32)


@dataclass(frozen=True)
class Constant:
    """A number with its unit in its name where it is used, and where it was published."""

    value: float
    source: str


@dataclass(frozen=True)
class Machine:
    """One GPU of an 8-GPU NVSwitch node.

    memory      bytes/s of HBM
    nvlink      bytes/s a GPU sends
    all_reduce  s of a small all-reduce over 8 GPUs in a CUDA graph, by a one-shot kernel (as vLLM and SGLang do it)
    all_gather  s of a small all-gather over 8 GPUs in a CUDA graph, which both leave to NCCL. NCCL's all-reduce stands
                in for it: no small all-gather was found published for these machines. It is slower, so this is too long
    """

    memory: Constant
    nvlink: Constant
    all_reduce: Constant
    all_gather: Constant


# A short kernel in a CUDA graph of such kernels, its 2.9 us of running included.
KERNEL_START = Constant(3.4e-6, "https://developer.nvidia.com/blog/cuda-graphs/ (V100)")
MACHINES = {
    "8 x A100": Machine(
        Constant(2.039e12, "NVIDIA A100 80GB SXM data sheet (specification)"),
        Constant(300e9, "NVIDIA A100 data sheet: 600 GB/s both ways (specification)"),
        Constant(24.2e-6, "https://github.com/microsoft/mscclpp/issues/531: MSCCL++ one-shot, 2 KiB, CUDA graph, A100"),
        Constant(44.3e-6, "https://github.com/microsoft/mscclpp/issues/531: NCCL all-reduce, 2 KiB, CUDA graph, A100"),
    ),
    "8 x H100": Machine(
        Constant(3.35e12, "NVIDIA H100 SXM data sheet (specification)"),
        Constant(450e9, "NVIDIA H100 data sheet: 900 GB/s both ways (specification)"),
        Constant(
            5.9e-6, "https://github.com/sgl-project/sglang/pull/2904: SGLang one-shot, 512 B, 8 ranks, H100, no graph"
        ),
        Constant(
            16.8e-6, "https://github.com/sgl-project/sglang/pull/22734: NCCL all-reduce, 2 KiB, 8 GPUs, CUDA graph"
        ),
    ),
}
# Block-diagonal over S-LoRA on 8 x A100, "up to" (arXiv 2510.23346): (model, rank as a multiple of the plain one).
PAPER = {
    ("Llama-3.1-70B", 2): 1.79,
    ("Llama-3.1-70B", 4): 1.23,
    ("Llama-3.1-8B", 2): 1.63,
    ("Llama-3.1-8B", 4): 1.30,
}
# Outside the paper's four: ms per token measured by one of its authors, vLLM of December 2024, one request of 3000
# tokens in 15 s without LoRA and 23 s with S-LoRA sharding on. https://github.com/vllm-project/vllm/issues/10898
LLAMA_2_7B = BaseSizes(hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, layers=32, vocab=32000)
MEASURED_MS = {"base": 5.0, "S-LoRA, r": 7.7}


def base_s(base: BaseSizes, machine: Machine, batch: int) -> float:
    """Seconds of a decode step without LoRA."""
    weights = base.layers * sum(i * o for _, i, o in modules_of(base)) + base.vocab * base.hidden
    reduced = 2 * base.layers * (machine.all_reduce.value + batch * base.hidden * 2 / machine.nvlink.value)
    return weights * 2 / TP / machine.memory.value + reduced + BASE_KERNELS * base.layers * KERNEL_START.value


def lora_s(base: BaseSizes, machine: Machine, sharding: Sharding, rank: int, batch: int) -> float:
    """Seconds that LoRA adds to a decode step, one adapter in the batch."""
    cost = lora_cost(base, sharding, rank, TP, batch, torch.bfloat16)
    return (
        cost.adapter_bytes / machine.memory.value
        + LORA_KERNELS * base.layers * KERNEL_START.value
        + cost.all_gathers * machine.all_gather.value
        + cost.all_reduces * machine.all_reduce.value
        + cost.sent_bytes / machine.nvlink.value
    )


def predict(recorder: Recorder, machine_name: str, model: str) -> None:
    """Predicted steps of all variants, and the speed-up of block-diagonal over S-LoRA's sharding beside the paper's."""
    base, machine = LLAMA[model], MACHINES[machine_name]
    scenario = f"{machine_name}, {model}"
    errors = {}
    for round_, (rank, batch) in enumerate(itertools.product(PLAIN_RANKS, BATCHES)):
        step = base_s(base, machine, batch)
        s_lora, stock = (step + lora_s(base, machine, sharding, rank, batch) for sharding in ("s-lora", "stock"))
        for variant, seconds in (("base", step), ("stock, r", stock), ("S-LoRA, r", s_lora)):
            recorder.add(scenario, variant, round_, {"step_ms": seconds * 1000})
        for multiple in (2, 4):
            bd = step + lora_s(base, machine, "block-diagonal", multiple * rank, batch)
            figures = {
                "step_ms": bd * 1000,
                "s_lora_over_it": s_lora / bd,
                "stock_over_it": stock / bd,
                "parameters_over_plain": parameters(base, multiple * rank, TP) / parameters(base, rank),
            }
            if machine_name == "8 x A100":
                reported = PAPER[model, multiple]
                figures |= {"reported": reported, "error": s_lora / bd / reported - 1}
                errors.setdefault(multiple, []).append(figures["error"])
            recorder.add(scenario, f"block-diagonal, {multiple}r", round_, figures)
            print(f"{scenario}, r {rank}, batch {batch}, {multiple}r: {s_lora / bd:.2f} x over S-LoRA's sharding")
    for multiple, values in errors.items():
        print(f"  paper {PAPER[model, multiple]:.2f} at {multiple}r: error {min(values):+.0%} to {max(values):+.0%}")


def validate(recorder: Recorder) -> None:
    """The model against a measurement that is none of the paper's four."""
    machine, scenario = MACHINES["8 x A100"], "8 x A100, Llama-2-7B, beside measured"
    step = base_s(LLAMA_2_7B, machine, 1)
    for variant, seconds in (("base", step), ("S-LoRA, r", step + lora_s(LLAMA_2_7B, machine, "s-lora", 16, 1))):
        measured, predicted = MEASURED_MS[variant], seconds * 1000
        error = predicted / measured - 1
        recorder.add(scenario, variant, 0, {"step_ms": predicted, "reported": measured, "error": error})
        print(f"Llama-2-7B {variant:9} predicted {predicted:.1f} ms, measured {measured} ms, error {error:+.0%}")


def main() -> None:
    constants = [f"kernel start {KERNEL_START.value * 1e6:g} us ({KERNEL_START.source})"]
    for name, machine in MACHINES.items():
        for field, constant in vars(machine).items():
            scale, unit = (1e6, "us") if field in ("all_reduce", "all_gather") else (1e-9, "GB/s")
            constants.append(f"{name} {field.replace('_', '-')} {constant.value * scale:g} {unit} ({constant.source})")
    settings = {
        "fitted": "nothing; the paper's four speed-ups are only compared with",
        "rounds": f"plain rank r in {PLAIN_RANKS} and batch in {BATCHES}",
        "constants": "; ".join(constants),
    }
    recorder = Recorder("cost_model", 0, settings, REPOSITORY / RESULTS)
    for machine_name, model in itertools.product(MACHINES, LLAMA):
        predict(recorder, machine_name, model)
    validate(recorder)
    recorder.finish()


if __name__ == "__main__":
    main()
