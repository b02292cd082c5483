"""What each sharding costs one decode forward on one TP rank, computed by the planners that serve adapters.

Nothing runs here: ``plan_linear`` says which elements a TP rank holds for the shapes of a model, every one of which is
multiplied once a token, and which linears need a collective. ``counts.py`` checks these numbers against real ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from sglang_blocklora.sharding.architectures import SPLIT_MODULES, kind_of, suffix_of
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.sharding.plan import LinearPlan, plan_linear
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters

from benchmark.paper.s_lora import sharding as s_lora

Sharding = Literal["stock", "s-lora", "block-diagonal"]
SHARDINGS: tuple[Sharding, ...] = ("stock", "s-lora", "block-diagonal")
LLAMA = {
    "Llama-3.1-8B": BaseSizes(
        hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, layers=32, vocab=128256
    ),
    "Llama-3.1-70B": BaseSizes(
        hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, layers=80, vocab=128256
    ),
}


@dataclass(frozen=True)
class Cost:
    """What LoRA adds to a decode forward on the TP rank that it costs most; all tokens under one adapter.

    input_bytes  what the rank puts into the collectives
    sent_bytes   what it sends with ring algorithms: 2 (N - 1) / N of an all-reduce's input, N - 1 of an all-gather's
    """

    all_gathers: int
    all_reduces: int
    gather_input_bytes: int
    reduce_input_bytes: int
    sent_bytes: int
    adapter_bytes: int
    flops: int


def modules_of(base: BaseSizes) -> list[tuple[str, int, int]]:
    """(module, in, out) of the seven linears of one layer."""
    features = base.features()
    return [(suffix, *features[suffix]) for suffix in SPLIT_MODULES]


def parameters(base: BaseSizes, rank: int, nblocks: int = 1) -> int:
    """Trained numbers of an adapter on all linears of all layers."""
    total = 0
    for suffix, inputs, outputs in modules_of(base):
        total += rank * (inputs // nblocks + outputs if kind_of(suffix) == "row" else inputs + outputs // nblocks)
    return total * base.layers


def matched_rank(base: BaseSizes, rank: int, nblocks: int) -> int:
    """Rank of a block-diagonal adapter with no more parameters than the plain one of ``rank``."""
    modules = modules_of(base)
    return match_rank(modules, nblocks, plain_parameters(modules, rank)).rank


def lora_cost(base: BaseSizes, sharding: Sharding, rank: int, tp: int, batch: int, dtype: torch.dtype) -> Cost:
    """The cost of an adapter of ``rank`` on all linears; block-diagonal ones have ``tp`` blocks.

    stock: SGLang 0.5.21 holds what we hold of a plain adapter, and all-reduces the shrink output of o and down.
    """
    costs = [_rank_cost(base, sharding, rank, tp, tp_rank, batch, dtype) for tp_rank in range(tp)]
    return Cost(*(max(values) for values in zip(*map(dataclasses.astuple, costs), strict=True)))


def _rank_cost(
    base: BaseSizes, sharding: Sharding, rank: int, tp: int, tp_rank: int, batch: int, dtype: torch.dtype
) -> Cost:
    spec = base.spec(dtype, tp_rank, tp)
    layer = spec.layers[0]
    modules = [module for linear in layer for module in linear.sources if suffix_of(module) in SPLIT_MODULES]
    shapes = {module: _shape(sharding, module, rank, tp) for module in modules}
    cut = s_lora.plan_linear if sharding == "s-lora" else plan_linear
    plans = [cut(linear, shapes, spec) for linear in layer]
    gathers = [_exchanged(plan, sharding, rank) for plan in plans if plan.linear.kind == "column"]
    reduces = [_exchanged(plan, sharding, rank) for plan in plans if plan.linear.kind == "row"]
    elements = base.layers * sum(sum(plan.sizes()) for plan in plans)
    scale = base.layers * batch * dtype.itemsize
    gather_bytes, reduce_bytes = scale * sum(gathers), scale * sum(reduces)
    return Cost(
        base.layers * sum(map(bool, gathers)),
        base.layers * sum(map(bool, reduces)),
        gather_bytes,
        reduce_bytes,
        (tp - 1) * gather_bytes + 2 * (tp - 1) * reduce_bytes // tp,
        elements * dtype.itemsize,
        2 * batch * elements,
    )


def _shape(sharding: Sharding, module: str, rank: int, nblocks: int) -> ModuleShape:
    if sharding != "block-diagonal":
        return ModuleShape(rank, 1, "plain")
    return ModuleShape(rank, nblocks, "block_a" if kind_of(module) == "row" else "block_b")


def _exchanged(plan: LinearPlan, sharding: Sharding, rank: int) -> int:
    """Elements a token that the rank puts into the linear's collective; 0 where there is none."""
    if sharding == "stock":
        return rank if plan.linear.kind == "row" else 0
    return sum(plan.shares) if isinstance(plan, s_lora.SplitPlan) else 0
