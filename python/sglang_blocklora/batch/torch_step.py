"""The torch path (CPU): deltas of one forward pass, adapter by adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import reference

from sglang_blocklora.adapters.model_spec import ModelSpec
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.step import Step
from sglang_blocklora.memory.pool import Pool, Resident

# [layer][linear], None where the adapter leaves the linear alone.
AdapterFactors = tuple[tuple[reference.LinearFactors | None, ...], ...]


class TorchStep(Step):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Factors of a resident adapter are resolved once: views of the arena where its slots are adjacent.
    """

    def __init__(self, spec: ModelSpec, pool: Pool) -> None:
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
        shard, planes = resident.adapter.shard, self._pool.arena.planes
        return tuple(
            tuple(
                reference.read_linear(
                    descriptor, scalings, layer_planes, resident.slots, linear.inputs.length, linear.out_offsets
                )
                if descriptor.h_width
                else None
                for descriptor, scalings, linear in zip(descriptors, layer_scalings, linears, strict=True)
            )
            for descriptors, layer_scalings, linears, layer_planes in zip(
                shard.descriptors, shard.scalings, self._spec.layers, planes, strict=True
            )
        )
