"""Adds the deltas of a forward pass with one launch each of shrink and expand a linear: the GPU path."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.side_stream import SideStream

from sglang_blocklora.batch.delta_adder import DeltaAdder
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.table_entries import TableEntries
from sglang_blocklora.memory.accounting import IntegrityError
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import ModelSpec

# Local rank of a slice that the tile table is asked for; it decides speed only.
USUAL_RANK = 64


class TritonAdder(DeltaAdder):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Everything the kernels read lies in buffers that keep their addresses, so a captured CUDA graph replays with other
    adapters: entries of resident adapters in an ``AdapterTable``, the batch's tiles in ``BatchMetadata``, one for
    captured decode batches and one, grown when needed, for all others. Device work is ordered by the current stream.
    """

    def __init__(
        self, spec: ModelSpec, pool: AdapterPool, max_rank: int, device: torch.device, overlap: bool = False
    ) -> None:
        """
        max_rank  largest full LoRA rank that is accepted: it bounds the columns of h
        overlap   run shrink on a second stream beside the linear's own GEMM
        """
        self._spec = spec
        self._pool = pool
        self._device = device
        self._h_width = max_rank * max(len(linear.outputs) for layer in spec.layers for linear in layer)
        planes = pool.arena.planes
        self._entries = TableEntries(spec, pool.max_adapters_per_batch, max_rank, device)
        table = self._entries.table
        self._linears = [
            [
                LoraLinear(
                    tuple(planes[i]),
                    table.slots,
                    table.first_slots,
                    table.descriptors[i, j],
                    table.scalings[i, j],
                    linear.inputs.length,
                    linear.out_offsets,
                    USUAL_RANK,
                )
                for j, linear in enumerate(layer)
            ]
            for i, layer in enumerate(spec.layers)
        ]
        self._graph_sizes: list[int] = []
        self._graph: BatchMetadata | None = None
        self._eager = self._new_metadata(4096)
        self._batch: BatchMetadata | None = None
        self._side = SideStream(device) if overlap else None

    def init_graphs(self, max_tokens: int) -> None:
        self._graph = self._new_metadata(max_tokens)

    def prepare_capture(self, tokens: int) -> None:
        if self._graph is None:
            raise IntegrityError("init_graphs comes before the capture")
        if tokens not in self._graph_sizes:
            self._graph_sizes = sorted([*self._graph_sizes, tokens])
        self._graph.update(group_by_adapter([], None), tokens, fixed_grid=True)
        self._batch = self._graph

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        resident = self._pool.resident
        entries = self._entries.of({key for key in keys if key is not None and key in resident}, resident)
        segments = group_by_adapter([entries.get(key, -1) if key else -1 for key in keys], token_counts)
        tokens = len(keys) if token_counts is None else int(sum(token_counts))
        position = bisect_left(self._graph_sizes, tokens)
        if token_counts is None and self._graph is not None and position < len(self._graph_sizes):
            # A graph may replay this batch, or not: upstream decides later. Metadata with the graph's tiles serve both.
            self._graph.update(segments, tokens, graph_tokens=self._graph_sizes[position])
            self._batch = self._graph
            return
        if not len(segments.adapters):
            self._batch = None
            return
        if tokens > self._eager.max_tokens:
            self._eager = self._new_metadata(1 << (tokens - 1).bit_length())
        self._eager.update(segments, tokens)
        self._batch = self._eager

    def reset(self) -> None:
        self._batch = None

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        if self._side is not None and self._batch is not None:
            with self._side.fork():
                self._linears[layer][linear].shrink(x, self._batch)

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        if self._batch is None:
            return
        if self._side is None:
            self._linears[layer][linear].shrink(x, self._batch)
        else:
            self._side.join()
        self._linears[layer][linear].expand_(out, self._batch)

    def _new_metadata(self, max_tokens: int) -> BatchMetadata:
        return BatchMetadata(max_tokens, self._pool.max_adapters_per_batch, self._h_width, self._device)
