"""Cuts the factors of one checkpoint module for one slice of a linear on one TP rank.

One rule covers plain and block-diagonal adapters: plain is n = 1. A factor that is block-diagonal along the axis that
tensor parallelism does not split (the wrong orientation) is made dense and served as n = 1 too. So is a TP rank's A
whose blocks begin within a vector load of a GPU: rows of A are read along that axis, whole vectors at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from blocklora_kernels.descriptor import Blocks

from sglang_blocklora.sharding.blocks import touched_blocks
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import Interval, LinearSpec

Factor = Literal["A", "B"]
Structure = Literal["plain", "block_a", "block_b"]  # which factor is packed block-diagonal
# read(factor, rows, columns) -> that part of the stored (packed) factor; None means all of an axis.
Read = Callable[[Factor, slice | None, slice | None], torch.Tensor]


@dataclass(frozen=True)
class ModuleShape:
    """What a checkpoint module is: full LoRA rank, blocks, and which factor is packed."""

    rank: int
    nblocks: int
    structure: Structure

    def stored_shapes(self, in_features: int, out_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_A and lora_B in the checkpoint."""
        n = self.nblocks
        a_columns = in_features // n if self.structure == "block_a" else in_features
        b_columns = self.rank // n if self.structure == "block_b" else self.rank
        return (self.rank, a_columns), (out_features, b_columns)

    def split_blocks(self, kind: str) -> int:
        """Blocks that sharding can use on a "column" or "row" linear; 1 where the orientation does not fit."""
        fits = self.structure == ("block_b" if kind == "column" else "block_a")
        return self.nblocks if fits else 1

    def made_dense(self, kind: str) -> bool:
        """Whether the module is block-diagonal in the orientation that sharding cannot use."""
        return self.structure != "plain" and self.nblocks > 1 and self.split_blocks(kind) == 1


@dataclass(frozen=True, kw_only=True)
class SliceCut:
    """A TP rank's part of one module for one slice.

    rank        columns of h that the local B reads; the local rank: rows of A that the TP rank holds
    first_rank  which row of the full A the local A starts at
    inputs      columns of the module's A that the TP rank holds, padding left out
    outputs     rows of the module's B that the TP rank holds, padding left out
    a, b        blocks of the local factors, ``Blocks(1, length, 0)`` where dense
    a_rows      rows of the local A in memory
    b_rows      rows of the local B in memory, padding included; block_rank: its columns
    """

    rank: int
    first_rank: int
    first_block: int
    inputs: Interval
    outputs: Interval
    a: Blocks
    a_rows: int
    b: Blocks
    b_rows: int
    block_rank: int


def cut_slice(linear: LinearSpec, slice_index: int, offset: int, size: int, shape: ModuleShape) -> SliceCut | None:
    """Which part of a module the TP rank holds for one slice of ``linear``; None where it holds only padding.

    offset, size  the slice's first row in the module and the module's rows (``Source``); unused on row linears
    """
    output = linear.outputs[slice_index]
    n = shape.split_blocks(linear.kind)
    inputs, outputs = linear.inputs.real, output.within(offset, size)
    split = outputs if linear.kind == "column" else inputs
    if split.length == 0:
        return None
    touched = touched_blocks(split, n)
    block_rank = shape.rank // n
    rank = touched.blocks.count * block_rank
    column = linear.kind == "column"
    a = Blocks(1, linear.inputs.length, 0) if column or _cuts_vectors(touched.blocks, linear) else touched.blocks
    return SliceCut(
        rank=rank,
        first_rank=touched.first * block_rank,
        first_block=touched.first,
        inputs=inputs,
        outputs=outputs,
        a=a,
        a_rows=rank // a.count,
        b=touched.blocks if column else Blocks(1, output.length, 0),
        b_rows=output.length,
        block_rank=block_rank if column else rank,
    )


def _cuts_vectors(blocks: Blocks, linear: LinearSpec) -> bool:
    """Whether rows of A are read in vectors, and one of them would hold columns of two blocks."""
    edges = linear.inputs.length, blocks.size, blocks.offset
    return blocks.count > 1 and edges[0] % ALIGNMENT_ELEMENTS == 0 and any(n % ALIGNMENT_ELEMENTS for n in edges[1:])


def read_a(linear: LinearSpec, cut: SliceCut, shape: ModuleShape, read: Read) -> torch.Tensor:
    """The local A [a_rows, local inputs], both without padding, reading no more than the TP rank needs."""
    if linear.kind == "column":
        if shape.structure == "block_a":
            return block_diagonal(read("A", None, None), shape.nblocks)
        return read("A", slice(cut.first_rank, min(cut.first_rank + cut.a_rows, shape.rank)), None)
    if shape.structure != "block_a":
        return read("A", None, slice(cut.inputs.start, cut.inputs.stop))
    parts = []
    block_rank, blocks = shape.rank // shape.nblocks, touched_blocks(cut.inputs, shape.nblocks).blocks
    for i in range(blocks.count):
        start, stop = blocks.bounds(i, cut.inputs.length)
        skipped = start + blocks.offset - i * blocks.size  # columns of the block that belong to the TP rank before
        block = cut.first_block + i
        rows = slice(block * block_rank, (block + 1) * block_rank)
        parts.append(read("A", rows, slice(skipped, skipped + stop - start)))
    return torch.cat(parts, dim=1) if cut.a == blocks else torch.block_diag(*parts)


def read_b(linear: LinearSpec, cut: SliceCut, shape: ModuleShape, read: Read) -> torch.Tensor:
    """The local B [local outputs without padding, block_rank], reading no more than the TP rank needs."""
    rows = slice(cut.outputs.start, cut.outputs.stop)
    if linear.kind == "column":
        return read("B", rows, None)
    if shape.structure == "block_b":
        return block_diagonal(read("B", None, None), shape.nblocks)
    return read("B", rows, slice(cut.first_rank, cut.first_rank + cut.rank))


def block_diagonal(packed: torch.Tensor, nblocks: int) -> torch.Tensor:
    """The dense matrix of a packed factor, A [r, in/n] -> [r, in] or B [out, r/n] -> [out, r].

    PEFT packs the diagonal blocks as equal chunks along dim 0.
    """
    dense: torch.Tensor = torch.block_diag(*packed.chunk(nblocks, dim=0))
    return dense
