"""What the GPU path takes of a GPU's memory outside the KV pool, at the sizes of real models.

    python -m blocklora_testing.gpu.budget

All that a server makes at its start is made on a GPU that does not exist, the KV pool of memory without contents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from blocklora_kernels import scatter
from sglang_blocklora import cpu_only
from sglang_blocklora.batch.triton_adder import TritonAdder
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.transfer import Transfer
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool

from blocklora_testing.gpu.device import CUDA, VirtualGPU
from blocklora_testing.toy import ToyModel, host_only_images

# What the launcher sets (--max-loras-per-batch, --max-lora-rank), and SGLang on these GPUs (decode graphs).
ADAPTERS, MAX_RANK, GRAPH_TOKENS = 64, 256, 512
# Of a GPU's memory, for weights and KV: less than SGLang's own defaults, so that the KV pool counts as small.
MEMORY_FRACTION = 0.8


@dataclass(frozen=True)
class GPU:
    """``prefill_tokens`` is SGLang's default for --chunked-prefill-size there."""

    name: str
    gib: float
    prefill_tokens: int


@dataclass(frozen=True)
class Model:
    """``parameters`` in 10⁹."""

    name: str
    sizes: ToyModel
    parameters: float


H100, H200 = GPU("H100", 79.1, 8192), GPU("H200", 139.8, 16384)
LLAMA_8B = Model(
    "Llama-3.1-8B",
    ToyModel(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336),
    8.0,
)
LLAMA_70B = Model(
    "Llama-3.1-70B",
    ToyModel(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, intermediate=28672),
    70.6,
)


def kv_slots(model: Model, tp: int, gpu: GPU, weight_bytes: float = 2.0) -> int:
    """Slots of the KV pool on a TP rank; none, or fewer, where the weights do not fit."""
    free = MEMORY_FRACTION * gpu.gib * 2**30 - model.parameters * 1e9 * weight_bytes / tp
    return int(free // slot_bytes(model, tp))


def slot_bytes(model: Model, tp: int) -> int:
    """Of one slot on a TP rank, in bfloat16."""
    return 2 * 2 * model.sizes.layers * max(model.sizes.kv_heads // tp, 1) * model.sizes.head_dim


def outside_the_pool(model: Model, tp: int, gpu: GPU, slots: int) -> Counter[str]:
    """Bytes of device memory by the line of ours that takes them, once a server has started.

    And, under a name of its own, the slot numbers of resident adapters if the whole pool were adapters.
    """
    from blocklora_testing.real_cache import new_cache  # imports SGLang, for which a program prepares first

    width = slot_bytes(model, tp) // (4 * model.sizes.layers)
    virtual = VirtualGPU()
    with pytest.MonkeyPatch.context() as patch, virtual.on():
        patch.setattr(scatter, "scatter_kernel", _Nothing())
        spec = model.sizes.spec(0, tp, torch.bfloat16, row_width=width)
        kv = [virtual.memory((slots + 1, 1, width), torch.bfloat16) for _ in range(2 * model.sizes.layers)]
        pool = UnifiedPool(ADAPTERS, host_only_images(), DecisionLog(None, 0), Transfer(CUDA))
        pool.bind_arena(KVArena(kv[: model.sizes.layers], kv[model.sizes.layers :]), slots)
        adder = TritonAdder(spec, pool, MAX_RANK, CUDA, max_tokens=gpu.prefill_tokens)
        adder.init_graphs("decode", GRAPH_TOKENS)
        adder.init_graphs("prefill", gpu.prefill_tokens)
        cache = new_cache(1, slots, device="cuda", core="python")
        pool.bind_cache(cache)
        taken: Counter[str] = Counter()
        for buffer in virtual.live():
            if not buffer.where.startswith(("[", "not ours")):
                taken[buffer.where] += buffer.size_bytes
    taken["slot numbers of adapters, if the pool held nothing else"] = 8 * slots
    return taken


def _short(where: str) -> str:
    """The name of what a line makes: its file's and the attribute's."""
    file, _, line = where.partition(": ")
    return f"`{file}` {line.partition(' = ')[0].removeprefix('self.').lstrip('_')}" if line else where


class _Nothing:
    """A kernel that is not run."""

    def __getitem__(self, grid: object) -> object:
        return lambda *args, **kwargs: None


# Model, TP size, bytes of a weight, GPU. Llama-3.1-70B on one GPU fits an H200 alone, and that in FP8 alone.
SERVERS = (
    *((LLAMA_8B, tp, 2.0, gpu) for tp in (1, 8) for gpu in (H100, H200)),
    *((LLAMA_70B, 8, 2.0, gpu) for gpu in (H100, H200)),
    (LLAMA_70B, 1, 1.0, H200),
)
TOO_SMALL = ((LLAMA_70B, 1, 2.0, H100), (LLAMA_70B, 1, 2.0, H200), (LLAMA_70B, 1, 1.0, H100))


def lines() -> Iterator[str]:
    """A Markdown table."""
    yield "| model, TP, GPU | KV pool, GiB | outside it, MiB | of the pool, % | the largest parts, MiB |"
    yield "|---|---|---|---|---|"
    for model, tp, weight_bytes, gpu in SERVERS:
        slots = kv_slots(model, tp, gpu, weight_bytes)
        pool_bytes, taken = slots * slot_bytes(model, tp), outside_the_pool(model, tp, gpu, slots)
        total = sum(taken.values())
        parts = ", ".join(f"{size / 2**20:.0f} {_short(where)}" for where, size in taken.most_common(4))
        name = f"{model.name}{' FP8' if weight_bytes == 1.0 else ''}, {tp}, {gpu.name}"
        share = 100 * total / pool_bytes
        yield f"| {name} | {pool_bytes / 2**30:.1f} | {total / 2**20:.0f} | {share:.2f} | {parts} |"


if __name__ == "__main__":
    cpu_only.prepare_import()
    for line in lines():
        print(line)
