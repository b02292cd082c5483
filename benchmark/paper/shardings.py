"""What each server's layout costs one decode forward on one TP rank, computed by the planners that serve adapters.

Nothing runs here: ``plan_linear`` says which elements a TP rank holds for the shapes of a model, every one of which is
multiplied once a token (of experts: those of the experts a token goes to), and which linears need a collective.
``counts.py`` checks these numbers against real ranks where the server can be run; ``LAYOUTS`` says where the others'
layouts are written down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from sglang_blocklora.sharding.architectures import SPLIT_MODULES, kind_of, suffix_of
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.sharding.layout import place
from sglang_blocklora.sharding.plan import LinearPlan, plan_linear
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.match_rank import match_rank, plain_parameters

from benchmark.paper.s_lora import sharding as s_lora

Sharding = Literal["stock", "stock-0.5.23", "vllm", "vllm-sharded", "s-lora", "plain", "block-diagonal"]


@dataclass(frozen=True)
class Layout:
    """How a server keeps and computes an adapter.

    cut        "whole": A of column-parallel linears and B of row-parallel ones whole on every TP rank. "split": both
               factors over the TP ranks, which then exchange what A gives. "blocks": block-diagonal, ``tp`` blocks
    reduces    whether what A gives of row-parallel linears is all-reduced beside the base layer's output
    slots      padded to the largest rank that the server takes; False: only what the adapter needs
    wide       whether what linears that are no experts exchange is float32, whatever the adapter's dtype
    source     where that is to be read
    """

    cut: Literal["whole", "split", "blocks"]
    reduces: bool = False
    slots: bool = False
    wide: bool = False
    source: str = "this planner"


LAYOUTS: dict[Sharding, Layout] = {
    "stock": Layout("whole", reduces=True, slots=True, source="sglang 0.5.21, lora/layers.py, lora/mem_pool.py"),
    # All backends, triton_v2 too: since 0.5.22 the boundary of a layer reduces, behind the sum.
    "stock-0.5.23": Layout("whole", slots=True, source="sglang 0.5.23, lora/mem_pool.py, models/"),
    "vllm": Layout("whole", slots=True, source="vllm 0.32.0, lora/layers/"),
    "vllm-sharded": Layout("split", slots=True, wide=True, source="vllm 0.32.0, lora/layers/, lora/ops/triton_ops/"),
    "s-lora": Layout("split", source="arXiv 2311.03285, section 6"),
    "plain": Layout("whole"),
    "block-diagonal": Layout("blocks"),
}
LLAMA = {
    "Llama-3.1-8B": BaseSizes(
        hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, layers=32, vocab=128256
    ),
    "Llama-3.1-70B": BaseSizes(
        hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, layers=80, vocab=128256
    ),
}
EXPERTS = {
    "Qwen3-30B-A3B": BaseSizes(
        hidden=2048,
        intermediate=6144,
        heads=32,
        kv_heads=4,
        head_dim=128,
        layers=48,
        vocab=151936,
        expert_layers=frozenset(range(48)),
        experts=128,
        expert_width=768,
    ),
    "Mixtral-8x7B": BaseSizes(
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        layers=32,
        vocab=32000,
        expert_layers=frozenset(range(32)),
        experts=8,
        expert_width=14336,
    ),
}
# Experts that a token goes to, by their number: num_experts_per_tok of the two config.json.
EXPERTS_OF_A_TOKEN = {128: 8, 8: 2}


@dataclass(frozen=True)
class Cost:
    """What LoRA adds to a decode forward on the TP rank that it costs most; all tokens under one adapter.

    input_bytes    what the rank puts into the collectives
    sent_bytes     what it sends with ring algorithms: 2 (N - 1) / N of an all-reduce's input, N - 1 of an all-gather's
    adapter_bytes  the rank's part of the adapter, without padding
    read_bytes     what of it a token reads: of experts only those that it goes to
    """

    all_gathers: int
    all_reduces: int
    gather_input_bytes: int
    reduce_input_bytes: int
    sent_bytes: int
    adapter_bytes: int
    read_bytes: int
    flops: int


def served(base: BaseSizes) -> list[Sharding]:
    """Layouts of a model with or without experts: S-LoRA knows none, and of 0.5.21 only Llama's was counted."""
    return [sharding for sharding in LAYOUTS if not (base.experts and sharding in ("stock", "s-lora"))]


def sources() -> str:
    """Where the layouts of others are written down."""
    return "; ".join(dict.fromkeys(layout.source for layout in LAYOUTS.values() if layout.slots))


def modules_of(base: BaseSizes) -> list[tuple[str, int, int]]:
    """(module, in, out) of the linears of one layer: seven, or attention's and three of every expert."""
    mlp = dataclasses.replace(base, intermediate=base.expert_width) if base.experts else base
    features = mlp.features()
    modules = [module for module in SPLIT_MODULES if module in features]
    attention, one_mlp = modules[:4], modules[4:]
    return [(suffix, *features[suffix]) for suffix in (*attention, *one_mlp * max(1, base.experts))]


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
    """The cost of an adapter of ``rank`` on all linears of a model whose layers are alike.

    Block-diagonal adapters have ``tp`` blocks. ``read_bytes`` is of one token: others may go to the same experts.
    """
    costs = [_rank_cost(base, sharding, rank, tp, tp_rank, batch, dtype) for tp_rank in range(tp)]
    return Cost(*(max(values) for values in zip(*map(dataclasses.astuple, costs), strict=True)))


def held_bytes(base: BaseSizes, sharding: Sharding, rank: int, largest_rank: int, tp: int, dtype: torch.dtype) -> int:
    """Memory of one adapter on the TP rank that holds most, where adapters of up to ``largest_rank`` are served.

    Of ours, rows of the KV cache's width in two planes; a slot of the others is sized for the largest rank.
    """
    layout = LAYOUTS[sharding]
    if layout.slots:
        return lora_cost(base, sharding, largest_rank, tp, 1, dtype).adapter_bytes
    if layout.cut == "split":
        return lora_cost(base, sharding, rank, tp, 1, dtype).adapter_bytes
    held = []
    for tp_rank in range(tp):
        plans, copies, row_width = _plans(base, layout, rank, tp, tp_rank, dtype)
        sizes = [size for plan, count in zip(plans, copies, strict=True) for size in plan.sizes() * count]
        held.append(place(sizes, row_width).rows * 2 * row_width * dtype.itemsize * base.layers)
    return max(held)


def _plans(
    base: BaseSizes, layout: Layout, rank: int, tp: int, tp_rank: int, dtype: torch.dtype
) -> tuple[list[LinearPlan], list[int], int]:
    """A layer's linears as a TP rank holds them, an expert's only once; how often each is there; the row width."""
    one = dataclasses.replace(
        base,
        layers=1,
        expert_layers=frozenset({0}) if base.experts else frozenset(),
        experts=min(1, base.experts),
    )
    spec = one.spec(dtype, tp_rank, tp)
    layer = spec.layers[0]
    modules = [module for linear in layer for module in linear.sources if suffix_of(module) in SPLIT_MODULES]
    shapes = {module: _shape(layout, module, rank, tp) for module in modules}
    cut = s_lora.plan_linear if layout.cut == "split" else plan_linear
    plans = [cut(linear, shapes, spec) for linear in layer]
    return plans, [base.experts if plan.linear.part == "expert" else 1 for plan in plans], spec.row_width


def _rank_cost(
    base: BaseSizes, sharding: Sharding, rank: int, tp: int, tp_rank: int, batch: int, dtype: torch.dtype
) -> Cost:
    layout = LAYOUTS[sharding]
    plans, copies, _ = _plans(base, layout, rank, tp, tp_rank, dtype)
    uses = [EXPERTS_OF_A_TOKEN[count] if count > 1 else 1 for count in copies]
    exchanged = [_exchanged_bytes(plan, layout, rank, dtype) if tp > 1 else 0 for plan in plans]
    calls = {"column": 0, "row": 0}
    put_in = {"column": 0, "row": 0}
    for plan, used, size in zip(plans, uses, exchanged, strict=True):
        calls[plan.linear.kind] += base.layers * bool(size)  # one for all experts of a layer
        put_in[plan.linear.kind] += base.layers * batch * used * size
    sizes = [sum(plan.sizes()) for plan in plans]
    held = base.layers * sum(size * count for size, count in zip(sizes, copies, strict=True))
    read = base.layers * sum(size * used for size, used in zip(sizes, uses, strict=True))
    return Cost(
        calls["column"],
        calls["row"],
        put_in["column"],
        put_in["row"],
        (tp - 1) * put_in["column"] + 2 * (tp - 1) * put_in["row"] // tp,
        held * dtype.itemsize,
        read * dtype.itemsize,
        2 * batch * read,
    )


def _shape(layout: Layout, module: str, rank: int, nblocks: int) -> ModuleShape:
    if layout.cut != "blocks":
        return ModuleShape(rank, 1, "plain")
    return ModuleShape(rank, nblocks, "block_a" if kind_of(module) == "row" else "block_b")


def _exchanged_bytes(plan: LinearPlan, layout: Layout, rank: int, dtype: torch.dtype) -> int:
    """What the rank puts into the linear's collective for a token; 0 where there is none."""
    itemsize = torch.float32.itemsize if layout.wide and plan.linear.part != "expert" else dtype.itemsize
    if isinstance(plan, s_lora.SplitPlan):
        return itemsize * sum(plan.shares)
    reduced = layout.reduces and plan.linear.kind == "row" and any(plan.parts)
    return itemsize * rank if reduced else 0
