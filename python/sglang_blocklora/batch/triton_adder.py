"""Adds the deltas of a forward pass with one launch each of shrink and expand a linear: the GPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import tiles
from blocklora_kernels.batch import BatchMetadata, Captured
from blocklora_kernels.experts import ExpertBatch
from blocklora_kernels.ops import NO_EXPERTS, ExpertDescriptors, LoraEmbedding, LoraLinear
from blocklora_kernels.side_stream import SideStream
from blocklora_kernels.table import ENTRY_FIELDS

from sglang_blocklora.batch.delta_adder import BatchKind, DeltaAdder, Overlap
from sglang_blocklora.batch.graphs import Graphs
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.table_entries import TableEntries
from sglang_blocklora.memory.accounting import IntegrityError
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import LinearSpec, ModelSpec, Part


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
        choices: int = 0,
    ) -> None:
        """
        max_rank    largest full LoRA rank that is accepted: it bounds the columns of h
        overlap     "stream": shrink runs on a second stream beside the linear's own GEMM; "launch": expand is launched
                    while shrink ends, for which a GPU must be of compute capability 9.0 or later
        max_tokens  most tokens of a batch; more are served, but take new memory while serving
        invariant   a token gets the same bits whatever is in its batch
        choices     experts that the router chooses for a token, where ``spec`` has experts
        """
        if overlap == "launch" and torch.cuda.get_device_capability(device) < (9, 0):
            raise ValueError(f"--adapter-overlap launch needs a GPU of compute capability 9.0, found {device}'s")
        self._spec = spec
        self._pool = pool
        self._device = device
        self._max_rank = max_rank
        self._invariant = invariant
        self._choices = choices
        self._h_width = max_rank * max(len(linear.outputs) for layer in spec.layers for linear in layer)
        self._entries = TableEntries(spec, pool.max_adapters_per_batch, max_rank, device)
        self._linears = [
            [
                self._linear(i, j, dependent=overlap == "launch")
                for j, linear in enumerate(layer)
                if linear.part == "layer"
            ]
            for i, layer in enumerate(spec.layers)
        ]
        self._experts = {i: self._experts_of(i) for i, layer in enumerate(spec.layers) if layer[-1].part == "expert"}
        self._expert_batches: dict[BatchMetadata, ExpertBatch] = {}
        self._embedding, self._head = self._embedding_of(), self._head_of()
        self._row_batches: dict[BatchMetadata, ExpertBatch] = {}
        self._used: frozenset[Part] = frozenset()  # what the batch's adapters are on
        self._captured: frozenset[Part] | None = None  # what graphs have the deltas of; None: there are no graphs
        self._logits: torch.Tensor | None = None  # owners of the rows of logits that are to come; None: of all tokens
        self._graphs: dict[BatchKind, Graphs] = {}
        self._eager = self._new_metadata(max_tokens)
        self._batch: BatchMetadata | None = None
        self._side = SideStream(device) if overlap == "stream" else None

    def init_graphs(self, kind: BatchKind, max_tokens: int) -> None:
        """Graphs are captured for the largest local rank of the adapters that are loaded by now.

        Without any they are captured for that of the largest adapter with a block for each TP rank. They have deltas of
        experts, embeddings and head only where one of those adapters is on them: others would pay for it at each step.
        """
        shards = [adapter.shard for adapter in self._pool.loaded.values()]
        self._captured = frozenset[Part]({"layer"}).union(*(shard.parts for shard in shards))
        ranks = [shard.local_rank for shard in shards]
        rank = max(ranks, default=-(-self._max_rank // self._spec.tp_size))
        shared = kind == "prefill" and max_tokens <= self._eager.max_tokens
        self._graphs[kind] = Graphs(self._eager if shared else self._new_metadata(max_tokens), rank)

    def prepare_capture(self, kind: BatchKind, tokens: int) -> None:
        if kind not in self._graphs:
            raise IntegrityError("init_graphs comes before the capture")
        self._graphs[kind].prepare_capture(tokens)
        self._batch, self._used = self._graphs[kind].batch, self._captured or frozenset()

    def not_captured(self, parts: frozenset[Part]) -> frozenset[Part]:
        """Those of ``parts`` that the graphs have no deltas of: an adapter on them would be left out in silence."""
        return parts - self._captured if self._captured is not None else frozenset()

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        self._batch = None
        kind: BatchKind = "decode" if token_counts is None else "prefill"
        if not any(keys) and (kind == "decode" or kind not in self._graphs):
            return  # a graph without adapters replays it, or none
        resident = self._pool.resident
        entries = self._entries.of({key for key in keys if key is not None and key in resident}, resident)
        rank = max((resident[key].adapter.shard.local_rank for key in entries), default=1)
        self._used = frozenset[Part]().union(*(resident[key].adapter.shard.parts for key in entries))
        segments = group_by_adapter([entries.get(key, -1) if key else -1 for key in keys], token_counts)
        tokens = len(keys) if token_counts is None else int(sum(token_counts))
        graphs = self._graphs.get(kind)
        if graphs and (graph := graphs.that_holds(tokens)):
            # A graph may replay this batch, or not: upstream decides later. Metadata with the graph's tiles serve both.
            graphs.batch.update(segments, tokens, rank, graph)
            self._batch = graphs.batch
        elif len(segments.adapters):
            if tokens > self._eager.max_tokens:
                if all(one.batch is not self._eager for one in self._graphs.values()):
                    self._expert_batches.pop(self._eager, None)
                    self._row_batches.pop(self._eager, None)
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
        if self._experts:
            self._compile_experts()

    def _compile_experts(self) -> None:
        batch, choices = self._eager, self._choices
        of_experts, dtype = self._expert_batches[batch], self._spec.dtype
        (gate_up, down), *_ = self._experts.values()
        for pairs in tiles.token_classes(batch.arch, batch.max_tokens * choices):
            tokens = pairs // choices
            ids = torch.zeros(tokens, choices, dtype=torch.int32, device=self._device)
            weights = torch.zeros(tokens * choices, device=self._device)
            for rank in tiles.rank_classes(batch.arch):
                batch.update_for_capture(Captured(tokens, rank))
                of_experts.update(ids, batch.owners, batch.rank)
                for linear, rows, factors in ((gate_up, tokens, None), (down, tokens * choices, weights)):
                    x = torch.empty(rows, linear.in_features, dtype=dtype, device=self._device)
                    out = torch.empty(tokens * choices, linear.out_offsets[-1], dtype=dtype, device=self._device)
                    linear.add_delta_(out, x, of_experts, factors)

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

    def joins_experts(self, layer: int) -> bool:
        """Whether the batch has adapters on experts, and ``layer`` has experts that they can be on."""
        return self._batch is not None and "expert" in self._used and layer in self._experts

    def add_to_gate_up_(self, layer: int, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> None:
        """Add the batch's deltas to the output of gate and up of the experts ``ids``, before the activation.

        out  [tokens * choices, 2 * width of an expert], a row for each pair of a token and a choice
        x    [tokens, hidden]; ids  int [tokens, choices], the router's choice; negative: none
        """
        batch = self._expert_batches[self._joined]
        batch.update(ids, self._joined.owners, self._joined.rank)
        self._experts[layer][0].add_delta_(out, x, batch)

    def add_to_down_(self, layer: int, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the batch's deltas to the output of down, of the same experts, before it is added up.

        out  [tokens * choices, hidden], already multiplied with the router's ``weights``, float32 [tokens * choices]
        x    [tokens * choices, width of an expert]
        """
        self._experts[layer][1].add_delta_(out, x, self._expert_batches[self._joined], weights)

    def add_to_embeddings_(self, out: torch.Tensor, ids: torch.Tensor) -> None:
        """Add the batch's deltas to the TP rank's part ``out`` [tokens, hidden] of the embeddings of ``ids`` [tokens].

        Ids that the rank does not have get none, and tokens of images, whose ids no vocabulary has.
        """
        if self._batch is not None and "embedding" in self._used and self._embedding is not None:
            self._embedding.add_delta_(out, ids, self._batch)

    @property
    def adapts_head(self) -> bool:
        """Whether an adapter of the batch is on the head: then ``prepare_logits`` is to be called."""
        return self._batch is not None and "head" in self._used and bool(self._head)

    def prepare_logits(self, tokens: torch.Tensor | None) -> None:
        """Logits follow of these tokens' hidden states: int64 [rows], the place of each in the batch; None: of all."""
        self._logits = None if tokens is None else self._joined.owners[tokens]

    def add_to_logits_(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add the batch's deltas to the TP rank's part ``logits`` [rows, local vocabulary] of the head's output.

        hidden  [rows, hidden], the head's input; with the next call's the rows that ``prepare_logits`` was told of
        """
        batch: BatchMetadata | ExpertBatch = self._joined
        if self._logits is not None:
            owners, self._logits = self._logits[: len(hidden)], self._logits[len(hidden) :]
            batch = self._row_batches[self._joined]
            batch.update(torch.zeros_like(owners)[:, None], owners, self._joined.rank)
        for linear, start in self._head:
            linear.add_delta_(logits[:, start : start + linear.out_offsets[-1]], hidden, batch)

    @property
    def _joined(self) -> BatchMetadata:
        if self._batch is None:
            raise IntegrityError("the batch has no adapters")
        return self._batch

    def _parts(self, part: Part) -> list[tuple[LoraLinear, LinearSpec]]:
        """Each layer's part of embeddings or head, where it has some."""
        return [
            (self._linear(i, j), linear)
            for i, layer in enumerate(self._spec.layers)
            for j, linear in enumerate(layer)
            if linear.part == part and linear.inputs.length and linear.out_offsets[-1]
        ]

    def _embedding_of(self) -> LoraEmbedding | None:
        parts = self._parts("embedding")
        return LoraEmbedding([(linear, part.inputs.start) for linear, part in parts]) if parts else None

    def _head_of(self) -> list[tuple[LoraLinear, int]]:
        """Each part, and the column of the rank's logits at which it begins."""
        parts = self._parts("head")
        return [(linear, part.outputs[0].start - parts[0][1].outputs[0].start) for linear, part in parts]

    def _linear(
        self,
        layer: int,
        linear: int,
        experts: ExpertDescriptors = NO_EXPERTS,
        choices: int = 1,
        dependent: bool = False,
    ) -> LoraLinear:
        spec, table = self._spec.layers[layer][linear], self._entries.table
        return LoraLinear(
            tuple(self._pool.arena.planes[layer]),
            table.slots,
            table.first_slots,
            table.descriptors[layer, linear],
            table.scalings[layer, linear],
            spec.inputs.length,
            spec.out_offsets,
            dependent=dependent,
            experts=experts,
            choices=choices,
        )

    def _experts_of(self, layer: int) -> tuple[LoraLinear, LoraLinear]:
        """Gate and up in one, and down, of all experts of ``layer``: those of expert 0, and how far others lie."""
        linears = self._spec.layers[layer]
        first = next(j for j, linear in enumerate(linears) if linear.part == "expert")
        experts = ExpertDescriptors((len(linears) - first) // 2, 2 * ENTRY_FIELDS)
        return self._linear(layer, first, experts, self._choices), self._linear(layer, first + 1, experts)

    def _new_metadata(self, max_tokens: int) -> BatchMetadata:
        rank = self._max_rank if self._invariant else None
        adapters, on_experts = self._pool.max_adapters_per_batch, bool(self._experts)
        owners, entries = on_experts or bool(self._head), len(self._entries.table.slots)
        batch = BatchMetadata(max_tokens, adapters, self._h_width, self._device, invariant_rank=rank, owners=owners)
        if self._head:
            self._row_batches[batch] = ExpertBatch(max_tokens, 1, 1, entries, self._h_width, self._device)
        if on_experts:
            experts, _ = next(iter(self._experts.values()))
            self._expert_batches[batch] = ExpertBatch(
                max_tokens, self._choices, experts.experts.number, entries, self._h_width, self._device
            )
        return batch
