"""Reads off SGLang's model which linears an adapter can attach to, as this TP rank holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.utils import get_layer_id
from sglang_blocklora.sharding.architectures import (
    ARCHITECTURES,
    ATTENTIONS,
    LATENT,
    LATENT_QUERY,
    LATENTS,
    MLPS,
    QKV,
    QUERY,
    Axis,
    O,
    model_spec,
    served,
)
from sglang_blocklora.sharding.linears import Interval, ModelSpec
from sglang_blocklora.sharding.vocabulary import Vocabulary

from blocklora_patches.releases.current import release

Layer = list[tuple[str, torch.nn.Module]]
Linears = list[Layer]
REPLICATED = tuple(f".{linear.path}" for linear in (LATENT, LATENTS))  # each TP rank has all of them


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
        replicated = isinstance(module, ReplicatedLinear) and path.endswith(REPLICATED)
        if replicated or isinstance(module, ColumnParallelLinear | RowParallelLinear):
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


def layer_path(layer: Layer) -> str:
    """The path of a decoder layer, of its linears as ``adaptable_linears`` has them."""
    return layer[0][0].rpartition(f".{O.parent}.")[0]


def _known(linears: dict[str, torch.nn.Module]) -> Layer:
    """Those of a decoder layer that the table has, in its order. Others, as experts' own, are not adapted."""
    layer = next((path.removesuffix(f".{O.path}") for path in linears if path.endswith(f".{O.path}")), None)
    found = served(lambda linear: f"{layer}.{linear.path}" in linears)
    if all(one.path != O.path for one in found):
        known = "; or ".join(", ".join(one.path for one in group) for group in ATTENTIONS)
        raise ValueError(f"SGLang's layer with {', '.join(linears)} has no attention of {known}")
    return [(path := f"{layer}.{one.path}", linears[path]) for one in found]


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


def _layer(linears: Layer, config: Any) -> tuple[str, dict[Axis, Interval]]:
    """Path of a decoder layer, and what this TP rank holds of its axes: SGLang's modules know how they are cut.

    Their widths may be padded: SGLang's CPU engine makes them divide by the TP size, and keeps what the checkpoint has
    as ``original_...`` in the config.
    """
    layer = layer_path(linears)
    modules = {path.removeprefix(f"{layer}."): module for path, module in linears}
    attention = _multi_head if QKV.path in modules else _latent
    axes = attention(modules, config)
    rows: dict[Axis, torch.nn.Module] = {"value" if "value" in axes else "query": modules[O.path]}
    for first, down in MLPS:
        if (column := modules.get(first.path)) is not None:
            width = getattr(config, "original_intermediate_size", column.output_size // len(first.parts))
            axes[down.inputs] = _share(column.output_partition_sizes[0], release.tp_rank_of(column), width)
            rows[down.inputs] = modules[down.path]
    for axis, row in rows.items():
        cut, expected = (row.input_size_per_partition, row.output_size), (axes[axis].length, axes["hidden"].size)
        if cut != expected:
            raise ValueError(f"SGLang cuts {axis} of {layer} in another way than it is known to: {cut}, not {expected}")
    return layer, axes


def _multi_head(modules: Mapping[str, Any], config: Any) -> dict[Axis, Interval]:
    """The axes of attention with keys and values; ``modules`` by their paths below the layer."""
    qkv = modules[QKV.path]
    rank = release.tp_rank_of(qkv)
    heads = getattr(config, "original_num_attention_heads", qkv.total_num_heads)
    kv_heads = getattr(config, "original_total_num_kv_heads", qkv.total_num_kv_heads)
    return {
        "hidden": Interval(0, qkv.input_size, qkv.input_size),
        "query": _share(qkv.q_proj_shard_size, rank, heads * qkv.head_size),
        # KV heads are dealt out, or replicated where there are more TP ranks than heads
        "key_value": _share(qkv.kv_proj_shard_size, rank // qkv.num_kv_head_replicas, kv_heads * qkv.head_size),
    }


def _latent(modules: Mapping[str, Any], config: Any) -> dict[Axis, Interval]:
    """The axes of multi-head latent attention: heads are dealt out, and each TP rank has all of the latents."""
    latents, o = modules.get(LATENTS.path) or modules[LATENT.path], modules[O.path]
    query = modules.get(QUERY.path) or modules[LATENT_QUERY.path]
    rank, heads = release.tp_rank_of(query), config.num_attention_heads
    real_heads = getattr(config, "original_num_attention_heads", heads)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    axes: dict[Axis, Interval] = {
        "hidden": Interval(0, latents.input_size, latents.input_size),
        "query": _share(query.output_size_per_partition, rank, query.output_size // heads * real_heads),
        "latent": Interval(0, width, width),
        "value": _share(o.input_size_per_partition, rank, config.v_head_dim * real_heads),
    }
    if QUERY.path in modules:
        axes["query_latent"] = Interval(0, query.input_size, query.input_size)
        width += query.input_size
    if latents.output_size != width:
        raise ValueError(f"SGLang's latents have {latents.output_size} columns, not {width} as the model's config says")
    return axes


def _share(length: int, index: int, size: int) -> Interval:
    """Part ``index`` of an axis of ``size`` that is dealt out in parts of ``length``."""
    return Interval(length * index, length * (index + 1), size)
