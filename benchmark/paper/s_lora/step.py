"""Adds the deltas of adapters that are split S-LoRA's way: shrink, one collective for all of them, expand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from blocklora_kernels import reference
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import ModelSpec

from benchmark.paper.s_lora.sharding import SplitDescriptor, out_offsets


class Collectives(Protocol):
    """What the TP ranks do together. Every rank must make the same calls with the same shapes, in the same order."""

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        """[TP size, *shape of values], in order of TP rank."""

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over TP ranks; ``values`` may be overwritten."""


class SplitFactors(NamedTuple):
    """One adapter's local factors on one linear.

    local   B's of its slices read the h of all TP ranks, slice after slice, each with its full LoRA rank
    shares  rows of each adapted slice's local A
    """

    local: reference.LinearFactors
    shares: tuple[int, ...]


class TPCollectives:
    """SGLang's own collectives of the TP group."""

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        from sglang.srt.runtime_context import get_parallel  # not before the launcher has prepared its import

        return get_parallel().tp_group.all_gather(values[None], dim=0)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        from sglang.srt.runtime_context import get_parallel

        return get_parallel().tp_group.all_reduce(values)


class SplitStep(TorchAdder):
    """The torch path, with a collective on each linear on which an adapter of the batch is split."""

    def __init__(self, spec: ModelSpec, pool: AdapterPool, collectives: Collectives | None = None) -> None:
        super().__init__(spec, pool)
        self._collectives = collectives or TPCollectives()

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        split = []
        for rows, factors in self._segments:
            own = factors[layer][linear]
            if isinstance(own, SplitFactors):
                split.append((rows, own))
            elif own is not None:
                reference.add_delta_(out, x, rows, own)
        if split:  # on every TP rank or on none: segments and shares follow from what all ranks agreed on
            add_deltas_(self._spec.layers[layer][linear].kind, out, x, split, self._collectives)

    def _stack_of(self, adapters: dict[str, Resident]) -> None:
        """Adapters are not multiplied at once: a collective stands between shrink and expand."""

    def _read_linear(self, resident: Resident, i: int, j: int) -> reference.LinearFactors | SplitFactors | None:
        descriptor = resident.adapter.shard.descriptors[i][j]
        if not isinstance(descriptor, SplitDescriptor) or not descriptor.h_width:
            return super()._read_linear(resident, i, j)
        spec, linear = self._spec, self._spec.layers[i][j]
        factors = reference.read_linear(
            descriptor,
            resident.adapter.shard.scalings[i][j],
            self._pool.arena.planes[i],
            resident.slots,
            linear.inputs.length,
            out_offsets(linear, spec.tp_rank, spec.tp_size),
        )
        return SplitFactors(factors, descriptor.shares)


def add_deltas_(
    kind: Literal["column", "row"],
    out: torch.Tensor,
    x: torch.Tensor,
    segments: Sequence[tuple[slice | torch.Tensor, SplitFactors]],
    collectives: Collectives,
) -> None:
    """Add the deltas of all ``segments`` (token rows, factors) to ``out`` with one collective.

    kind  of the linear: "column" gathers h, "row" sums it
    out, x  [tokens, local outputs] and [tokens, local inputs]
    """
    local = [reference.shrink(x[rows], factors.local) for rows, factors in segments]
    flat = torch.cat([h.view(-1) for h in local])
    sizes = [h.numel() for h in local]
    if kind == "column":
        parts = collectives.all_gather(flat).split(sizes, dim=1)
        whole = [_gathered(h, factors) for h, (_, factors) in zip(parts, segments, strict=True)]
    else:
        sums = collectives.all_reduce(flat).split(sizes)
        whole = [h.view(own.shape) for h, own in zip(sums, local, strict=True)]
    for h, (rows, factors) in zip(whole, segments, strict=True):
        part = out[rows]
        reference.expand_(part, h, factors.local)
        if not isinstance(rows, slice):
            out[rows] = part


def _gathered(parts: torch.Tensor, factors: SplitFactors) -> torch.Tensor:
    """h [tokens, LoRA ranks of all slices] from every TP rank's part, [TP size, tokens * local rows of A].

    What rounded up the shares comes last and falls away.
    """
    slices = parts.view(len(parts), -1, sum(factors.shares)).transpose(0, 1).split(factors.shares, dim=2)
    return torch.cat(
        [h.flatten(1)[:, : b.block_rank] for h, b in zip(slices, factors.local.slices, strict=True)], dim=1
    )
