"""A small mixed batch with its answer in float64, from dense algebra that knows nothing of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from blocklora_kernels.batch import BatchMetadata, Captured
from blocklora_kernels.descriptor import MAX_SLICES, Address, Blocks, LinearDescriptor, SliceDescriptor
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.segments import Segments
from blocklora_kernels.table import AdapterTable, pack_entry

from sglang_blocklora.sharding.layout import place

WIDTH = 128  # of an arena row
NOWHERE = Address(0, 0, 0)  # until the matrix is placed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A linear on one TP rank: column-parallel with several slices, or row-parallel with one."""

    inputs: int
    outputs: tuple[int, ...]
    row_parallel: bool = False


@dataclass(frozen=True)
class Packed:
    """One adapter on the linear.

    matrices    A, then the transpose of each slice's B, as they lie in the arena
    dense       per slice (A [r, in], B [out, r]) of the same adapter, in float64
    descriptor  without addresses
    """

    matrices: list[torch.Tensor]
    dense: list[tuple[torch.Tensor, torch.Tensor]]
    descriptor: LinearDescriptor


class Problem:
    """A linear with adapters in an arena on ``device``, and the answers to batches of their tokens.

    adapters  (rank, nblocks) of each; nblocks 1 is plain LoRA
    """

    def __init__(
        self, shape: Shape, adapters: Sequence[tuple[int, int]], max_tokens: int, dtype: torch.dtype, device: str
    ) -> None:
        self._random = torch.Generator().manual_seed(0)
        self._dtype, self._device = dtype, torch.device(device)
        self.shape = shape
        self._adapters = [self._pack(rank, nblocks) for rank, nblocks in adapters]
        self._scalings = [0.5 + index for index in range(len(adapters))]
        self.linear = self._fill_arena()
        width = max(adapter.descriptor.h_width for adapter in self._adapters)
        self.batch = BatchMetadata(max_tokens, len(adapters), width, self._device)

    def draw(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations x [tokens, in] and the base layer's output [tokens, out], on the device."""
        x, out = self._normal(tokens, self.shape.inputs), self._normal(tokens, sum(self.shape.outputs))
        return x.to(self._device), out.to(self._device)

    def describe(self, adapters: np.ndarray, graph: Captured | None = None) -> None:
        """Make the batch one of a token each for ``adapters`` (-1: the base model); for a graph see ``update``."""
        rank = max(adapter.descriptor.largest_rank for adapter in self._adapters)
        self.batch.update(Segments.build(adapters), len(adapters), rank, graph)

    def error(self, adapters: np.ndarray, x: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> float:
        """Largest relative error of an adapter's delta on a slice; infinite where another token was changed.

        before, after  output of the base layer, and what became of it
        """
        x, before, after = (value.double().cpu() for value in (x, before, after))
        base = torch.from_numpy(adapters < 0)
        if not torch.equal(before[base], after[base]):
            return float("inf")
        worst = 0.0
        for index, (adapter, scaling) in enumerate(zip(self._adapters, self._scalings, strict=True)):
            tokens = torch.from_numpy(adapters == index)
            found = (after - before)[tokens].split(self.shape.outputs, dim=1)
            for (a, b), delta in zip(adapter.dense, found, strict=True):
                expected = scaling * x[tokens] @ a.T @ b.T
                error = (delta - expected).norm() / expected.norm()
                worst = max(worst, float(error.nan_to_num(float("inf"))))
        return worst

    def _normal(self, rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=self._random) * scale).to(self._dtype)

    def _pack(self, rank: int, n: int) -> Packed:
        """An adapter of full ``rank``, with ``n`` blocks along the axis that tensor parallelism splits."""
        inputs, outputs = self.shape.inputs, self.shape.outputs
        if self.shape.row_parallel:  # A is block-diagonal: [rank / n, in] in the arena
            chunks = [self._normal(rank // n, inputs // n, (n / inputs) ** 0.5) for _ in range(n)]
            b = self._normal(outputs[0], rank, rank**-0.5)
            one = SliceDescriptor(rank, 0, NOWHERE, rank, Blocks(1, outputs[0], 0))
            descriptor = LinearDescriptor(rank, rank // n, NOWHERE, Blocks(n, inputs // n, 0), (one,))
            dense = [(torch.block_diag(*chunks).double(), b.double())]
            return Packed([torch.cat(chunks, dim=1), b.T], dense, descriptor)
        slices, matrices, dense = [], [self._normal(rank * len(outputs), inputs, inputs**-0.5)], []
        for index, length in enumerate(outputs):  # B is block-diagonal: [rank / n, out] in the arena
            b = self._normal(length, rank // n, (n / rank) ** 0.5)
            slices.append(SliceDescriptor(rank, index * rank, NOWHERE, rank // n, Blocks(n, length // n, 0)))
            matrices.append(b.T)
            a = matrices[0][index * rank : (index + 1) * rank]
            dense.append((a.double(), torch.block_diag(*b.chunk(n)).double()))
        stacked = rank * len(outputs)
        return Packed(matrices, dense, LinearDescriptor(stacked, stacked, NOWHERE, Blocks(1, inputs, 0), tuple(slices)))

    def _fill_arena(self) -> LoraLinear:
        """Write every adapter into rows of its own that are not adjacent, and the table that tells where."""
        layouts = [place([matrix.numel() for matrix in one.matrices], WIDTH) for one in self._adapters]
        count, most = len(layouts), max(layout.rows for layout in layouts)
        planes = [torch.full((most * count, WIDTH), torch.nan, dtype=self._dtype) for _ in range(2)]
        table = AdapterTable(1, 1, count, most, self._device)
        for index, (adapter, layout, scaling) in enumerate(zip(self._adapters, layouts, self._scalings, strict=True)):
            slots = np.arange(layout.rows) * count + index
            for matrix, (plane, row, column) in zip(adapter.matrices, layout.addresses, strict=True):
                places = row * WIDTH + column + np.arange(matrix.numel())
                planes[plane][slots[places // WIDTH], places % WIDTH] = matrix.flatten()
            first, *others = layout.addresses
            slices = tuple(
                one._replace(address=address) for one, address in zip(adapter.descriptor.slices, others, strict=True)
            )
            descriptor = np.array(adapter.descriptor._replace(address=first, slices=slices).pack(), np.int32)
            entry = pack_entry(descriptor[None, None], np.full((1, 1, MAX_SLICES), scaling, np.float32))
            table.write(index, torch.from_numpy(slots).to(self._device), entry)
        return LoraLinear(
            [plane.to(self._device) for plane in planes],
            table.slots,
            table.first_slots,
            table.descriptors[0, 0],
            table.scalings[0, 0],
            self.shape.inputs,
            np.cumsum([0, *self.shape.outputs]).tolist(),
        )
