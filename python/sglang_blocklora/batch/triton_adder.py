"""Adds the deltas of a forward pass with one launch each of shrink and expand a linear: the GPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import tiles
from blocklora_kernels.batch import BatchMetadata, Captured
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.side_stream import SideStream

from sglang_blocklora.batch.delta_adder import BatchKind, DeltaAdder, Overlap
from sglang_blocklora.batch.graphs import Graphs
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.table_entries import TableEntries
from sglang_blocklora.memory.accounting import IntegrityError
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import ModelSpec


class TritonAdder(DeltaAdder):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Everything the kernels read lies in buffers that keep their addresses, so a captured CUDA graph replays with other
    adapters: entries of resident adapters in an ``AdapterTable``, the batch's tiles in ``BatchMetadata``, one for
    each kind of captured batches and one, grown when needed, for all others. Device work is ordered by the current
    stream.
    """

    def __init__(
        self,
        spec: ModelSpec,
        pool: AdapterPool,
        max_rank: int,
        device: torch.device,
        overlap: Overlap = "off",
        max_tokens: int = 4096,
        invariant: bool = False,
    ) -> None:
        """
        max_rank    largest full LoRA rank that is accepted: it bounds the columns of h
        overlap     "stream": shrink runs on a second stream beside the linear's own GEMM; "launch": expand is launched
                    while shrink ends, for which a GPU must be of compute capability 9.0 or later
        max_tokens  most tokens of a batch; more are served, but take new memory while serving
        invariant   a token gets the same bits whatever is in its batch
        """
        if overlap == "launch" and torch.cuda.get_device_capability(device) < (9, 0):
            raise ValueError(f"--adapter-overlap launch needs a GPU of compute capability 9.0, found {device}'s")
        self._spec = spec
        self._pool = pool
        self._device = device
        self._max_rank = max_rank
        self._invariant = invariant
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
                    dependent=overlap == "launch",
                )
                for j, linear in enumerate(layer)
            ]
            for i, layer in enumerate(spec.layers)
        ]
        self._graphs: dict[BatchKind, Graphs] = {}
        self._eager = self._new_metadata(max_tokens)
        self._batch: BatchMetadata | None = None
        self._side = SideStream(device) if overlap == "stream" else None

    def init_graphs(self, kind: BatchKind, max_tokens: int) -> None:
        """Graphs are captured for the largest local rank of the adapters that are loaded by now.

        Without any they are captured for that of the largest adapter with a block for each TP rank.
        """
        ranks = [adapter.shard.local_rank for adapter in self._pool.loaded.values()]
        rank = max(ranks, default=-(-self._max_rank // self._spec.tp_size))
        shared = kind == "prefill" and max_tokens <= self._eager.max_tokens
        self._graphs[kind] = Graphs(self._eager if shared else self._new_metadata(max_tokens), rank)

    def prepare_capture(self, kind: BatchKind, tokens: int) -> None:
        if kind not in self._graphs:
            raise IntegrityError("init_graphs comes before the capture")
        self._graphs[kind].prepare_capture(tokens)
        self._batch = self._graphs[kind].batch

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        self._batch = None
        kind: BatchKind = "decode" if token_counts is None else "prefill"
        if not any(keys) and (kind == "decode" or kind not in self._graphs):
            return  # a graph without adapters replays it, or none
        resident = self._pool.resident
        entries = self._entries.of({key for key in keys if key is not None and key in resident}, resident)
        rank = max((resident[key].adapter.shard.local_rank for key in entries), default=1)
        segments = group_by_adapter([entries.get(key, -1) if key else -1 for key in keys], token_counts)
        tokens = len(keys) if token_counts is None else int(sum(token_counts))
        graphs = self._graphs.get(kind)
        if graphs and (graph := graphs.that_holds(tokens)):
            # A graph may replay this batch, or not: upstream decides later. Metadata with the graph's tiles serve both.
            graphs.batch.update(segments, tokens, rank, graph)
            self._batch = graphs.batch
        elif len(segments.adapters):
            if tokens > self._eager.max_tokens:
                self._eager = self._new_metadata(1 << (tokens - 1).bit_length())
            self._eager.update(segments, tokens, rank)
            self._batch = self._eager

    def compile(self) -> None:
        """Compile all kernels that serving can need, by launches for which no token is adapted."""
        batch = self._eager
        dtype = self._spec.dtype
        shapes = {(one.in_features, one.out_offsets): one for layer in self._linears for one in layer}
        for tokens in tiles.token_classes(batch.arch, batch.max_tokens):
            for rank in tiles.rank_classes(batch.arch):
                batch.update_for_capture(Captured(tokens, rank), batch_tokens=1)
                for (inputs, offsets), linear in shapes.items():
                    x, out = (torch.empty(1, n, dtype=dtype, device=self._device) for n in (inputs, offsets[-1]))
                    linear.add_delta_(out, x, batch)

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
        rank = self._max_rank if self._invariant else None
        adapters = self._pool.max_adapters_per_batch
        return BatchMetadata(max_tokens, adapters, self._h_width, self._device, invariant_rank=rank)
