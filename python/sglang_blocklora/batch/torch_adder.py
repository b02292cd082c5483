"""Adds the deltas of a forward pass in torch: the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blocklora_kernels import reference

from sglang_blocklora.batch.delta_adder import BatchKind, DeltaAdder
from sglang_blocklora.batch.grouping import group_by_adapter
from sglang_blocklora.batch.stack import AdapterFactors, Stack, StackedBatch, stack_bytes
from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.sharding.linears import Interval, ModelSpec, Part

# With more tokens, computing all adapters for all tokens takes longer than to go from adapter to adapter.
MOST_STACKED_TOKENS = 128
# Copies of adapters' factors that are made for it, beside the arena.
MOST_STACKED_BYTES = 256 * 2**20


class TorchAdder(DeltaAdder):
    """Adds adapters' deltas to the outputs of linears, for the batch given to ``prepare``.

    Factors of a resident adapter are resolved once: views of the arena where its slots are adjacent. A batch of many
    tokens goes from adapter to adapter; one of few tokens has all its adapters at once (``blocklora_kernels.stacked``),
    be it one, from the second one on with the same adapters.
    """

    def __init__(self, spec: ModelSpec, pool: AdapterPool) -> None:
        self._spec = spec
        self._ends = [sum(linear.part == "layer" for linear in layer) for layer in spec.layers]
        self._first_expert = [sum(linear.part != "expert" for linear in layer) for layer in spec.layers]
        self._embedding, self._head = _parts(spec, "embedding"), _parts(spec, "head")
        self._pool = pool
        self._factors: dict[str, tuple[Resident, AdapterFactors]] = {}
        self._segments: list[tuple[slice | torch.Tensor, AdapterFactors]] = []
        self._batch: tuple[list[str], list[int], Sequence[int] | None] = [], [], None
        self._logits: list[int] = []  # of each row of logits that is to come, its adapter's index in the batch, or -1
        self._last: dict[str, Resident] = {}
        self._stack: Stack | None = None
        self._stacked: StackedBatch | None = None

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        resident = self._pool.resident
        used = sorted({key for key in keys if key is not None and key in resident})
        index = {key: i for i, key in enumerate(used)}
        indices = [index.get(key, -1) if key else -1 for key in keys]
        self._batch, self._logits = (used, indices, token_counts), []
        segments = group_by_adapter(indices, token_counts)
        self._segments = [
            (segments.rows(g), self._resolve(used[adapter])) for g, adapter in enumerate(segments.adapters)
        ]
        tokens = len(keys) if token_counts is None else sum(token_counts)
        few = bool(used) and tokens <= MOST_STACKED_TOKENS
        stack = self._stack_of({key: resident[key] for key in used}) if few else None
        self._stacked = StackedBatch(stack, keys, token_counts) if stack is not None else None

    def reset(self) -> None:
        self._segments, self._stacked = [], None
        self._batch, self._logits = ([], [], None), []

    def init_graphs(self, kind: BatchKind, max_tokens: int) -> None:
        raise ValueError("the torch path cannot run in CUDA graphs: start with --disable-cuda-graph")

    def prepare_capture(self, kind: BatchKind, tokens: int) -> None:
        raise ValueError("the torch path cannot run in CUDA graphs: start with --disable-cuda-graph")

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        """Nothing runs beside the GEMM on a CPU."""

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        if self._stacked is not None:
            self._stacked.add_deltas_(layer, linear, out, x)
            return
        for rows, factors in self._segments:
            own = factors[layer][linear]
            if own is not None:
                reference.add_delta_(out, x, rows, own)

    def experts(self, layer: int) -> list[tuple[slice | torch.Tensor, tuple[reference.LinearFactors | None, ...]]]:
        """The batch's adapters on experts of ``layer``.

        Of each its tokens, a slice or int64 [tokens], and its factors: of expert e's gate and up at 2 e, of its down at
        2 e + 1, None where it leaves them alone.
        """
        first = self._first_expert[layer]
        return [(rows, own) for rows, factors in self._segments if (own := factors[layer][first:])]

    def add_to_embeddings_(self, out: torch.Tensor, ids: torch.Tensor) -> None:
        """Add the batch's deltas to the TP rank's part ``out`` [tokens, hidden] of the embeddings of ``ids`` [tokens].

        Ids that the rank does not have get none, and tokens of images, whose ids no vocabulary has.
        """
        numbers = torch.arange(len(ids))
        for rows, factors in self._segments:
            parts = [(factor, part) for i, j, part in self._embedding if (factor := factors[i][j]) is not None]
            tokens = numbers[rows]
            for factor, part in parts:
                own = tokens[(ids[tokens] >= part.start) & (ids[tokens] < part.stop)]
                if len(own):
                    delta = out[own]
                    reference.expand_(delta, reference.look_up(ids[own] - part.start, factor), factor)
                    out[own] = delta

    @property
    def adapts_head(self) -> bool:
        """Whether an adapter of the batch is on the head: then ``prepare_logits`` is to be called."""
        return any(factors[i][j] is not None for _, factors in self._segments for i, j, _ in self._head)

    def prepare_logits(self, tokens: torch.Tensor | None) -> None:
        """Logits follow of these tokens' hidden states: int64 [rows], the place of each in the batch; None: of all."""
        _, indices, counts = self._batch
        of_tokens = torch.tensor(indices)
        if counts is not None:
            of_tokens = of_tokens.repeat_interleave(torch.tensor(counts))
        self._logits = (of_tokens if tokens is None else of_tokens[tokens]).tolist()

    def add_to_logits_(self, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add the batch's deltas to the TP rank's part ``logits`` [rows, local vocabulary] of the head's output.

        hidden  [rows, hidden], the head's input; with the next call's the rows that ``prepare_logits`` was told of
        """
        adapters, self._logits = self._logits[: len(hidden)], self._logits[len(hidden) :]
        used, segments = self._batch[0], group_by_adapter(adapters, None)
        for g, adapter in enumerate(segments.adapters):
            factors, rows = self._resolve(used[adapter]), segments.rows(g)
            for i, j, interval in self._head:
                if (factor := factors[i][j]) is not None:
                    start = interval.start - self._head[0][2].start
                    part = logits[:, start : start + interval.length]
                    reference.add_delta_(part, hidden, rows, factor)

    def _stack_of(self, adapters: dict[str, Resident]) -> Stack | None:
        """The stack with these adapters, made where the last batch had the same; None where there is none."""
        again = adapters.keys() == self._last.keys() and all(self._last[key] is own for key, own in adapters.items())
        self._last = adapters
        if self._stack is not None and self._stack.serves(adapters):
            return self._stack
        self._stack = None
        factors = [self._of_layers(self._factors[key][1]) for key in adapters]
        if again and sum(map(stack_bytes, factors)) <= MOST_STACKED_BYTES:
            self._stack = Stack.of(adapters, factors)
        return self._stack

    def _of_layers(self, factors: AdapterFactors) -> AdapterFactors:
        return tuple(layer[:end] for layer, end in zip(factors, self._ends, strict=True))

    def _resolve(self, key: str) -> AdapterFactors:
        resident = self._pool.resident[key]
        known = self._factors.get(key)
        if known is None or known[0] is not resident:
            self._factors = {k: v for k, v in self._factors.items() if self._pool.resident.get(k) is v[0]}
            known = self._factors[key] = (resident, self._read(resident))
        return known[1]

    def _read(self, resident: Resident) -> AdapterFactors:
        return tuple(self._read_layer(resident, i) for i in range(len(self._spec.layers)))

    def _read_layer(self, resident: Resident, i: int) -> tuple[reference.LinearFactors | None, ...]:
        """Factors of a layer's linears; those of experts are left out where the adapter is on none of them."""
        factors = tuple(self._read_linear(resident, i, j) for j in range(len(self._spec.layers[i])))
        first = self._first_expert[i]
        return factors if any(one is not None for one in factors[first:]) else factors[:first]

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


def _parts(spec: ModelSpec, part: Part) -> list[tuple[int, int, Interval]]:
    """Of each layer's part of embeddings or head: layer, index of the linear, the token ids it has."""
    return [
        (i, j, linear.inputs if part == "embedding" else linear.outputs[0])
        for i, layer in enumerate(spec.layers)
        for j, linear in enumerate(layer)
        if linear.part == part
    ]
