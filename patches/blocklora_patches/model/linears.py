"""SGLang's model -> ``ModelSpec``: which linears an adapter can attach to, as this TP rank holds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.utils import get_layer_id
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import Interval, LinearSpec, ModelSpec, Source

# Architectures whose linears were compared with PEFT token by token (test/e2e). Another one may order or gate its
# fused outputs differently, and would then answer wrongly in silence.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
)


def adaptable_linears(model: torch.nn.Module) -> list[list[tuple[str, torch.nn.Module]]]:
    """Per decoder layer, its adaptable linears (path, module) in execution order.

    ``ValueError`` for an architecture that is not served.
    """
    architecture = type(model).__name__
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"sglang-blocklora does not serve {architecture}; it serves {', '.join(ARCHITECTURES)}. "
            "Start this model with stock SGLang (python -m sglang.launch_server)."
        )
    layers: dict[int, list[tuple[str, torch.nn.Module]]] = {}
    for path, module in model.named_modules():
        layer = get_layer_id(path)
        if layer is not None and isinstance(module, QKVParallelLinear | MergedColumnParallelLinear | RowParallelLinear):
            layers.setdefault(layer, []).append((path, module))
    return [layers[index] for index in sorted(layers)]


@dataclass(frozen=True)
class CheckpointSizes:
    """Widths as the checkpoint has them: SGLang's CPU engine pads its own until they divide by the TP size."""

    q: int
    kv: int
    intermediate: int

    @staticmethod
    def of(config: Any, head_dim: int) -> CheckpointSizes:
        """From the model's config, in which upstream keeps what it replaced as ``original_...``."""
        heads = getattr(config, "original_num_attention_heads", config.num_attention_heads)
        kv_heads = getattr(config, "original_total_num_kv_heads", config.num_key_value_heads)
        intermediate = getattr(config, "original_intermediate_size", config.intermediate_size)
        return CheckpointSizes(heads * head_dim, kv_heads * head_dim, intermediate)


def build_spec(
    linears: list[list[tuple[str, torch.nn.Module]]],
    config: Any,
    targets: set[str],
    dtype: torch.dtype,
    rank: int,
    size: int,
    s_lora: bool = False,
) -> ModelSpec:
    """The spec of ``linears`` on TP rank ``rank`` of ``size``; the row width is that of the model's KV cache.

    config   the base model's Hugging Face config
    targets  Hugging Face module suffixes (q_proj, o_proj, ...) that adapters may have; {"all"} for every one
    s_lora   split plain adapters S-LoRA's way; a single TP rank has nothing to split
    """
    qkv = next(m for layer in linears for _, m in layer if isinstance(m, QKVParallelLinear))
    sizes = CheckpointSizes.of(config, qkv.head_size)
    whole = [[_linear(path, module, sizes) for path, module in layer] for layer in linears]
    specs = tuple(tuple(_only(linear, targets) for linear in layer) for layer in whole)
    row_width = -(-qkv.kv_proj_shard_size // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
    left_out = {
        module
        for layer, kept in zip(whole, specs, strict=True)
        for linear, own in zip(layer, kept, strict=True)
        for module in linear.sources.keys() - own.sources.keys()
    }
    return ModelSpec(
        layers=specs,
        row_width=row_width,
        dtype=dtype,
        vocab_size=config.vocab_size,
        tp_rank=rank,
        tp_size=size,
        s_lora=s_lora and size > 1,
        left_out=frozenset(left_out),
    )


def _only(linear: LinearSpec, targets: set[str]) -> LinearSpec:
    """``linear`` with the sources that are in ``targets``."""
    if "all" in targets:
        return linear
    kept = {module: source for module, source in linear.sources.items() if module.rpartition(".")[2] in targets}
    return dataclasses.replace(linear, sources=kept)


def _linear(path: str, module: torch.nn.Module, sizes: CheckpointSizes) -> LinearSpec:
    parent, _, name = path.rpartition(".")
    if isinstance(module, RowParallelLinear):
        inputs = sizes.q if name == "o_proj" else sizes.intermediate
        return LinearSpec(
            name=path,
            kind="row",
            inputs=_share(module.input_size_per_partition, module.tp_rank, inputs),
            outputs=(Interval(0, module.output_size, module.output_size),),
            sources={path: Source((0,), (0,), module.output_size)},
        )
    if isinstance(module, QKVParallelLinear):
        outputs = _qkv_outputs(module, sizes)
    else:
        outputs = tuple(_share(own, module.tp_rank, sizes.intermediate) for own in module.output_partition_sizes)
    offsets = [sum(o.size for o in outputs[:i]) for i in range(len(outputs))]
    sources = {f"{parent}.{part}": Source((i,), (0,), outputs[i].size) for i, part in enumerate(_parts(name))}
    sources[path] = Source(tuple(range(len(outputs))), tuple(offsets), sum(o.size for o in outputs))
    inputs = Interval(0, module.input_size, module.input_size)
    return LinearSpec(name=path, kind="column", inputs=inputs, outputs=outputs, sources=sources)


def _parts(name: str) -> tuple[str, ...]:
    """Hugging Face's modules that SGLang fuses into ``name``."""
    return {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(name, (name,))


def _share(length: int, index: int, size: int) -> Interval:
    """Part ``index`` of an axis of ``size`` that is dealt out in parts of ``length``."""
    return Interval(length * index, length * (index + 1), size)


def _qkv_outputs(module: QKVParallelLinear, sizes: CheckpointSizes) -> tuple[Interval, ...]:
    """Query heads are dealt out; KV heads too, or replicated where there are more TP ranks than heads."""
    kv = _share(module.kv_proj_shard_size, module.tp_rank // module.num_kv_head_replicas, sizes.kv)
    return _share(module.q_proj_shard_size, module.tp_rank, sizes.q), kv, kv
