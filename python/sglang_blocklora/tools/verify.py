"""Checks that the TP ranks' parts of an adapter recombine to the delta that PEFT computes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from blocklora_kernels import reference

from sglang_blocklora.adapters.shard import AdapterShard, load_shard
from sglang_blocklora.sharding.linears import LinearSpec
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.opened import NO_RANK_LIMIT, OpenedAdapter, open_adapter

# Inputs per module. Two linear maps that agree on this many random vectors are equal with probability 1.
PROBES = 8
TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How far the parts are off: ``max_relative_error`` over all modules, in float64."""

    tp_size: int
    modules: int
    max_relative_error: float
    worst_module: str

    @property
    def passed(self) -> bool:
        return self.max_relative_error <= TOLERANCE


def verify(folder: Path, base: BaseSizes | None, tp_sizes: Sequence[int]) -> list[Verification]:
    """Cut the adapter for every TP rank as a server does, and compare with the dense delta. Raises ``AdapterError``."""
    with open_adapter(folder, base) as adapter:
        return [_verify_at(adapter, size) for size in tp_sizes]


def _verify_at(adapter: OpenedAdapter, tp_size: int) -> Verification:
    outputs: dict[str, torch.Tensor] = {}
    for rank in range(tp_size):
        spec = adapter.spec(rank, tp_size, torch.float64)
        shard, image = load_shard(adapter.name, adapter.folder, spec, NO_RANK_LIMIT, known=True)
        for layer, linears in enumerate(spec.layers):
            for index, linear in enumerate(linears):
                _add_rank(outputs, shard, image, layer, index, linear, adapter.modules)
    errors = {}
    for module, found in outputs.items():
        a, b = adapter.dense_factors(module)
        expected = _probe(a.shape[1]) @ a.t() @ b.t() * adapter.modules[module].scaling
        scale = float(expected.norm())
        errors[module] = float((found - expected).norm()) / scale if scale else float(found.norm())
    worst = max(errors, key=lambda module: errors[module])
    return Verification(tp_size=tp_size, modules=len(errors), max_relative_error=errors[worst], worst_module=worst)


def _probe(in_features: int) -> torch.Tensor:
    """Random inputs [PROBES, in], the same at every call."""
    generator = torch.Generator().manual_seed(in_features)
    return torch.randn(PROBES, in_features, generator=generator, dtype=torch.float64)


def _add_rank(
    outputs: dict[str, torch.Tensor],
    shard: AdapterShard,
    image: torch.Tensor,
    layer: int,
    index: int,
    linear: LinearSpec,
    modules: Collection[str],
) -> None:
    """Put one TP rank's part into ``outputs`` (module -> [PROBES, out]): added on row linears, placed on others."""
    adapted = [i for i, one in enumerate(shard.descriptors[layer][index].slices) if one.rank]
    own = linear.inputs
    x = torch.zeros(PROBES, own.length, dtype=torch.float64)
    real = own.real
    x[:, : real.length] = _probe(own.size)[:, real.start : real.stop]
    out = torch.zeros(PROBES, linear.out_offsets[-1], dtype=torch.float64)
    if adapted:
        factors = reference.read_linear(
            shard.descriptors[layer][index],
            shard.scalings[layer][index],
            tuple(image[layer]),
            torch.arange(shard.slots),
            own.length,
            linear.out_offsets,
        )
        reference.add_delta_(out, x, slice(None), factors)
    for module, source in linear.sources.items():
        if module not in modules:
            continue
        fill = 0.0 if linear.kind == "row" else float("nan")
        total = outputs.setdefault(module, torch.full((PROBES, source.size), fill, dtype=torch.float64))
        if linear.kind == "row":
            total += out
            continue
        for slice_index, offset in zip(source.slices, source.offsets, strict=True):
            place = linear.outputs[slice_index].within(offset, source.size)
            start = linear.out_offsets[slice_index]
            total[:, place.start : place.stop] = out[:, start : start + place.length]
