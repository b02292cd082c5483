"""Adds the deltas of a forward pass adapter by adapter, in torch: the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import reference

from sglang_blocklora.batch import s_lora_step
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.s_lora_step import Collectives, SplitFactors
from sglang_blocklora.batch.step import Step
from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding import s_lora
from sglang_blocklora.sharding.linears import ModelSpec

# [layer][linear], None where the adapter leaves the linear alone.
AdapterFactors = tuple[tuple[reference.LinearFactors | SplitFactors | None, ...], ...]


class TorchStep(Step):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Factors of a resident adapter are resolved once: views of the arena where its slots are adjacent.
    """

    def __init__(self, spec: ModelSpec, pool: AdapterPool, collectives: Collectives | None = None) -> None:
        """
        collectives  of the TP group; needed where ``spec.s_lora`` splits plain adapters, used by nothing else
        """
        self._spec = spec
        self._collectives = collectives
        self._pool = pool
        self._factors: dict[str, tuple[Resident, AdapterFactors]] = {}
        self._segments: list[tuple[slice | torch.Tensor, AdapterFactors]] = []

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        resident = self._pool.resident
        used = sorted({key for key in keys if key is not None and key in resident})
        index = {key: i for i, key in enumerate(used)}
        segments = group_by_adapter([index.get(key, -1) if key else -1 for key in keys], token_counts)
        self._segments = [
            (segments.rows(g), self._resolve(used[adapter])) for g, adapter in enumerate(segments.adapters)
        ]

    def reset(self) -> None:
        self._segments = []

    def init_graphs(self, max_tokens: int) -> None:
        raise ValueError("the torch path cannot run in CUDA graphs: start with --disable-cuda-graph")

    def prepare_capture(self, tokens: int) -> None:
        raise ValueError("the torch path cannot run in CUDA graphs: start with --disable-cuda-graph")

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        """Nothing runs beside the GEMM on a CPU."""

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        split = []
        for rows, factors in self._segments:
            own = factors[layer][linear]
            if isinstance(own, SplitFactors):
                split.append((rows, own))
            elif own is not None:
                reference.add_delta_(out, x, rows, own)
        if split:  # on every TP rank or on none: segments and shares follow from what all ranks agreed on
            assert self._collectives is not None
            s_lora_step.add_deltas_(self._spec.layers[layer][linear].kind, out, x, split, self._collectives)

    def _resolve(self, key: str) -> AdapterFactors:
        resident = self._pool.resident[key]
        known = self._factors.get(key)
        if known is None or known[0] is not resident:
            self._factors = {k: v for k, v in self._factors.items() if self._pool.resident.get(k) is v[0]}
            known = self._factors[key] = (resident, self._read(resident))
        return known[1]

    def _read(self, resident: Resident) -> AdapterFactors:
        return tuple(
            tuple(self._read_linear(resident, i, j) for j in range(len(layer)))
            for i, layer in enumerate(self._spec.layers)
        )

    def _read_linear(self, resident: Resident, i: int, j: int) -> reference.LinearFactors | SplitFactors | None:
        shard, spec, linear = resident.adapter.shard, self._spec, self._spec.layers[i][j]
        descriptor, shares = shard.descriptors[i][j], shard.shares[i][j]
        if not descriptor.h_width:
            return None
        out_offsets = s_lora.out_offsets(linear, spec.tp_rank, spec.tp_size) if shares else linear.out_offsets
        factors = reference.read_linear(
            descriptor,
            shard.scalings[i][j],
            self._pool.arena.planes[i],
            resident.slots,
            linear.inputs.length,
            out_offsets,
        )
        return SplitFactors(factors, shares) if shares else factors
