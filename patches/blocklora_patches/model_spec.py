"""SGLang's model -> ``ModelSpec``: which linears an adapter can attach to, as this TP rank holds them."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.utils import get_layer_id
from sglang_blocklora.adapters.model_spec import Interval, LinearSpec, ModelSpec, Source

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


def build_spec(
    linears: list[list[tuple[str, torch.nn.Module]]],
    targets: set[str],
    dtype: torch.dtype,
    vocab_size: int,
    rank: int,
    size: int,
) -> ModelSpec:
    """The spec of ``linears`` on TP rank ``rank`` of ``size``; the row width is that of the model's KV cache.

    targets  Hugging Face module suffixes (q_proj, o_proj, ...) that adapters may have; {"all"} for every one
    """
    qkv = next(m for layer in linears for _, m in layer if isinstance(m, QKVParallelLinear))
    specs = tuple(tuple(_linear(path, module, targets) for path, module in layer) for layer in linears)
    return ModelSpec(specs, qkv.kv_proj_shard_size, dtype, vocab_size, rank, size)


def _linear(path: str, module: torch.nn.Module, targets: set[str]) -> LinearSpec:
    parent, _, name = path.rpartition(".")
    if isinstance(module, RowParallelLinear):
        share = module.input_size_per_partition
        return LinearSpec(
            path,
            "row",
            Interval(share * module.tp_rank, share * (module.tp_rank + 1), module.input_size),
            (Interval(0, module.output_size, module.output_size),),
            {path: Source((0,), (0,), module.output_size)} if targets & {"all", name} else {},
        )
    outputs = _qkv_outputs(module) if isinstance(module, QKVParallelLinear) else _merged_outputs(module)
    offsets = [sum(o.size for o in outputs[:i]) for i in range(len(outputs))]
    sources = {
        f"{parent}.{part}": Source((i,), (0,), outputs[i].size)
        for i, part in enumerate(_parts(name))
        if targets & {"all", part}
    }
    if targets & {"all", name}:
        sources[path] = Source(tuple(range(len(outputs))), tuple(offsets), sum(o.size for o in outputs))
    return LinearSpec(path, "column", Interval(0, module.input_size, module.input_size), outputs, sources)


def _parts(name: str) -> tuple[str, ...]:
    """Hugging Face's modules that SGLang fuses into ``name``."""
    return {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(name, (name,))


def _qkv_outputs(module: QKVParallelLinear) -> tuple[Interval, ...]:
    """Query heads are dealt out; KV heads too, or replicated where there are more TP ranks than heads."""
    q, kv = module.q_proj_shard_size, module.kv_proj_shard_size
    kv_index = module.tp_rank // module.num_kv_head_replicas
    kv_size = module.total_num_kv_heads * module.head_size
    q_out = Interval(q * module.tp_rank, q * (module.tp_rank + 1), module.total_num_heads * module.head_size)
    kv_out = Interval(kv * kv_index, kv * (kv_index + 1), kv_size)
    return q_out, kv_out, kv_out


def _merged_outputs(module: MergedColumnParallelLinear) -> tuple[Interval, ...]:
    return tuple(
        Interval(share * module.tp_rank, share * (module.tp_rank + 1), size)
        for size, share in zip(module.output_sizes, module.output_partition_sizes, strict=True)
    )
