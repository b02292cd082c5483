"""Adds the deltas of a forward pass adapter by adapter, in torch: the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import reference

from sglang_blocklora.batch.delta_adder import DeltaAdder
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import ModelSpec

# [layer][linear], None where the adapter leaves the linear alone.
AdapterFactors = tuple[tuple[reference.LinearFactors | None, ...], ...]


class TorchAdder(DeltaAdder):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Factors of a resident adapter are resolved once: views of the arena where its slots are adjacent.
    """

    def __init__(self, spec: ModelSpec, pool: AdapterPool) -> None:
        self._spec = spec
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
        for rows, factors in self._segments:
            own = factors[layer][linear]
            if own is not None:
                reference.add_delta_(out, x, rows, own)

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

    def _read_linear(self, resident: Resident, i: int, j: int) -> reference.LinearFactors | None:
        shard, linear = resident.adapter.shard, self._spec.layers[i][j]
        descriptor = shard.descriptors[i][j]
        if not descriptor.h_width:
            return None
        return reference.read_linear(
            descriptor,
            shard.scalings[i][j],
            self._pool.arena.planes[i],
            resident.slots,
            linear.inputs.length,
            linear.out_offsets,
        )
