"""Reads off SGLang's model which linears an adapter can attach to, as this TP rank holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.utils import get_layer_id
from sglang_blocklora.sharding.architectures import (
    ARCHITECTURES,
    MLPS,
    QKV,
    Axis,
    O,
    model_spec,
)
from sglang_blocklora.sharding.linears import Interval, ModelSpec
from sglang_blocklora.sharding.vocabulary import Vocabulary

from blocklora_patches.releases.current import release

Linears = list[list[tuple[str, torch.nn.Module]]]


def adaptable_linears(model: torch.nn.Module) -> Linears:
    """Per decoder layer, its adaptable linears (path, module) in execution order.

    Of a model with several towers those of the language part, as its ``should_apply_lora`` says. ``ValueError`` for a
    model whose decoder layers are not made of what the table has.
    """
    wanted = getattr(model, "should_apply_lora", None)
    layers: dict[int, dict[str, torch.nn.Module]] = {}
    for path, module in model.named_modules():
        layer = get_layer_id(path)
        if layer is None or (wanted is not None and not wanted(path)):
            continue
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            layers.setdefault(layer, {})[path] = module
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers with linears that adapters can be on")
    for index, linears in layers.items():
        towers = sorted({path.partition(f"layers.{index}.")[0] for path in linears})
        if len(towers) > 1:
            raise ValueError(
                f"{type(model).__name__} has layers in {' and '.join(towers)}, and does not say which to adapt"
            )
    return [_known(layers[index]) for index in sorted(layers)]


def is_compared(model: torch.nn.Module) -> bool:
    """Whether its architecture was compared with PEFT token by token."""
    return type(model).__name__ in ARCHITECTURES


def _known(linears: dict[str, torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Those of a decoder layer that the table has, in its order. Others, as experts' own, are not adapted."""
    layer = next((path.removesuffix(f".{QKV.path}") for path in linears if path.endswith(f".{QKV.path}")), None)
    if f"{layer}.{O.path}" not in linears:
        raise ValueError(f"SGLang's layer with {', '.join(linears)} has not both {QKV.path} and {O.path}")
    has = [mlp for mlp in MLPS if {f"{layer}.{one.path}" for one in mlp} <= linears.keys()]
    served = (QKV, O, *(has[0] if has else ()))
    return [(path := f"{layer}.{one.path}", linears[path]) for one in served]


def build_spec(
    linears: Linears,
    experts: Mapping[int, FusedMoE],
    vocabulary: Vocabulary | None,
    config: Any,
    targets: set[str],
    dtype: torch.dtype,
    rank: int,
    size: int,
) -> ModelSpec:
    """The spec of ``linears`` on TP rank ``rank`` of ``size``; the other arguments are ``model_spec``'s.

    config      the base model's Hugging Face config
    experts     those that adapters can be on (``experts.adaptable_experts``)
    vocabulary  embeddings and head, where adapters can be on them (``vocabulary.adaptable_vocabulary``)
    """
    layers = [_layer(layer, config) for layer in linears]
    for i, module in experts.items():
        layers[i][1]["expert"] = _experts(module, config)
    return model_spec(
        dict(layers),
        experts={layers[i][0]: module.num_experts for i, module in experts.items()},
        vocabulary=vocabulary,
        dtype=dtype,
        vocab_size=config.vocab_size,
        tp_rank=rank,
        tp_size=size,
        targets=targets,
    )


def _experts(module: FusedMoE, config: Any) -> Interval:
    """The TP rank's part of the intermediate width of one expert."""
    name = "moe_intermediate_size" if getattr(config, "moe_intermediate_size", None) else "intermediate_size"
    width = getattr(config, f"original_{name}", getattr(config, name))
    return _share(module.intermediate_size_per_partition, module.moe_tp_rank, width)


def _layer(linears: list[tuple[str, torch.nn.Module]], config: Any) -> tuple[str, dict[Axis, Interval]]:
    """Path of a decoder layer, and what this TP rank holds of its axes: SGLang's modules know how they are cut.

    Their widths may be padded: SGLang's CPU engine makes them divide by the TP size, and keeps what the checkpoint has
    as ``original_...`` in the config.
    """
    layer, modules = linears[0][0].removesuffix(f".{QKV.path}"), dict(linears)
    qkv = modules[f"{layer}.{QKV.path}"]
    rank = release.tp_rank_of(qkv)
    heads = getattr(config, "original_num_attention_heads", qkv.total_num_heads)
    kv_heads = getattr(config, "original_total_num_kv_heads", qkv.total_num_kv_heads)
    axes: dict[Axis, Interval] = {
        "hidden": Interval(0, qkv.input_size, qkv.input_size),
        "query": _share(qkv.q_proj_shard_size, rank, heads * qkv.head_size),
        # KV heads are dealt out, or replicated where there are more TP ranks than heads
        "key_value": _share(qkv.kv_proj_shard_size, rank // qkv.num_kv_head_replicas, kv_heads * qkv.head_size),
    }
    rows: dict[Axis, torch.nn.Module] = {"query": modules[f"{layer}.{O.path}"]}
    for first, down in MLPS:
        if (column := modules.get(f"{layer}.{first.path}")) is not None:
            width = getattr(config, "original_intermediate_size", column.output_size // len(first.parts))
            axes[down.inputs] = _share(column.output_partition_sizes[0], release.tp_rank_of(column), width)
            rows[down.inputs] = modules[f"{layer}.{down.path}"]
    for axis, row in rows.items():
        cut, expected = (row.input_size_per_partition, row.output_size), (axes[axis].length, qkv.input_size)
        if cut != expected:
            raise ValueError(f"SGLang cuts {axis} of {layer} in another way than it is known to: {cut}, not {expected}")
    return layer, axes


def _share(length: int, index: int, size: int) -> Interval:
    """Part ``index`` of an axis of ``size`` that is dealt out in parts of ``length``."""
    return Interval(length * index, length * (index + 1), size)
