"""Tells how many adapters fit, before there is a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blocklora.memory.images import image_bytes
from sglang_blocklora.sharding.architectures import SPLIT_MODULES, kind_of, suffix_of
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.inspect_adapter import cost_per_rank

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """How many adapters of one size fit on each TP rank.

    slots_per_adapter  rows of the arena that one takes, bytes_per_adapter their bytes
    slot_bytes         bytes of one slot: with unified memory those of one token of KV
    slots              of the arena, and kv_tokens: those of them that are kept for KV
    resident           adapters that fit beside that KV at once
    in_host_memory     adapters that host memory keeps; others are read from disk when they are asked for
    estimated          whether ``slots`` was computed from the size of a GPU: a server tells the true number
    """

    rank: int
    nblocks: int
    dtype: str
    tp_size: int
    slots_per_adapter: int
    bytes_per_adapter: int
    slot_bytes: int
    slots: int
    kv_tokens: int
    resident: int
    in_host_memory: int
    estimated: bool


def size(
    base: BaseSizes,
    rank: int,
    nblocks: int,
    tp_size: int,
    dtype: torch.dtype,
    *,
    slots: int | None,
    free_bytes: int,
    kv_tokens: int,
    host_bytes: int,
) -> Sizing:
    """How many adapters of LoRA rank ``rank`` on all linears fit.

    slots       of a server's arena; None: as many as ``free_bytes`` hold, which a GPU has beside the weights
    host_bytes  of --adapter-host-memory-gb; pinned, so each adapter takes a power of two
    ``ValueError`` where no adapter can have these sizes, where there is no room for ``kv_tokens``, or where adapters
    share no memory with KV and room for some is asked for.
    """
    if wrong := undivided(base, rank, nblocks):
        raise ValueError(f"{wrong} is no multiple of nblocks {nblocks}: choose another --nblocks or --rank")
    if base.engine_for(tp_size) == "cpu":
        raise ValueError(f"TP size {tp_size} does not divide the model's heads and widths: choose another --tp")
    _, per_adapter, bytes_per_adapter = cost_per_rank(base, shapes(base, rank, nblocks), tp_size, dtype)
    slot_bytes = bytes_per_adapter // per_adapter
    if base.latents is not None and (slots is None or kv_tokens):
        raise ValueError(
            "adapters of a model with multi-head latent attention have static memory beside the KV cache: give --slots "
            f"(--adapter-memory-mb over {slot_bytes} bytes), and no --kv-tokens"
        )
    total = free_bytes // slot_bytes if slots is None else slots
    if total <= kv_tokens:
        raise ValueError(
            f"{max(0, total)} slots of {slot_bytes} bytes leave nothing beside {kv_tokens} tokens of KV: give more "
            "memory for each GPU, a larger --tp or fewer --kv-tokens"
        )
    return Sizing(
        rank=rank,
        nblocks=nblocks,
        dtype=str(dtype).removeprefix("torch."),
        tp_size=tp_size,
        slots_per_adapter=per_adapter,
        bytes_per_adapter=bytes_per_adapter,
        slot_bytes=slot_bytes,
        slots=total,
        kv_tokens=kv_tokens,
        resident=(total - kv_tokens) // per_adapter,
        in_host_memory=host_bytes // image_bytes(per_adapter, slot_bytes, pinned=True),
        estimated=slots is None,
    )


def bytes_beside_weights(model: Path, tp_size: int, gpu_bytes: int, fraction: float) -> int:
    """Bytes of a GPU that are left for slots: SGLang's share of it (--mem-fraction-static) without its weights.

    ``ValueError`` where ``model`` is not a folder with the weights' files.
    """
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{model} has no *.safetensors, whose size is needed: give --slots, or the model's folder")
    return int(gpu_bytes * fraction) - weights // tp_size


def undivided(base: BaseSizes, rank: int, nblocks: int) -> str | None:
    """What blocks must divide and do not, if anything."""
    numbers = {f"rank {rank}": rank}
    for module, (inputs, outputs) in base.features().items():
        if module in SPLIT_MODULES:
            numbers |= {f"{module}'s input {inputs}": inputs} if kind_of(module) == "row" else {}
            numbers |= {f"{module}'s output {outputs}": outputs} if kind_of(module) == "column" else {}
    return next((name for name, number in numbers.items() if number % nblocks), None)


def shapes(base: BaseSizes, rank: int, nblocks: int) -> dict[str, ModuleShape]:
    """Module path -> shape, of an adapter on all linears but experts', with blocks that sharding can use."""
    spec = base.spec(torch.float32, 0, 1)
    paths = [path for path in spec.find() if suffix_of(path) in SPLIT_MODULES and ".experts." not in path]
    return {
        path: ModuleShape(
            rank, nblocks, "plain" if nblocks == 1 else "block_a" if kind_of(path) == "row" else "block_b"
        )
        for path in paths
    }
