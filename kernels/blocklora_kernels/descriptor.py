"""Describes where the factors of one adapter lie in the arena, and how their blocks run.

One *linear* is one (possibly fused) base layer on one TP rank: qkv (3 slices), gate_up (2), o or down (1).
The local factors of an adapter on that linear are

    A   [a_rows, in]         one matrix for all slices (their rows stacked)
    B_s [out_s, block_rank]  one matrix per slice s, stored transposed: [block_rank, out_s]

and both may be block-diagonal along their long axis. Block i of an axis covers positions
``[i * block_size - block_offset, (i + 1) * block_size - block_offset)`` cut to the axis; so position p lies in block
``(block_offset + p) // block_size``, and the first and the last block may be cut short (a TP rank's share need not
start or end on a block's edge). A dense factor has one block. With ``i`` the block of a position:

    column-parallel  h[t, j]                   = sum over all c of x[t, c] * A[j, c]                     (a_blocks = 1)
    row-parallel     h[t, i * a_rows + k]      = sum over the columns c of block i of x[t, c] * A[k, c]  (a_blocks >= 1)
    both             out[t, o_s + o]          += scaling_s * sum_k h[t, h_start_s + i * block_rank + k] * B_s[o, k]

``h`` has ``h_width = a_rows * a_blocks`` columns. At most one side has more than one block.

A matrix is stored row-major as one run of elements of one *plane* (0 = K rows, 1 = V rows of the layer), starting in
arena row ``row`` at element ``column`` and flowing through the following rows of width W. Arena row ``i`` of adapter
``a`` is physical row ``slot_table[a, i]`` of the plane.

Kernels read vectors of 8 elements where ``in`` and all ``out_s`` are multiples of 8. Then every matrix must start on a
multiple of 8, and so must every block of A on the input axis; ranks, and blocks of B, may be of any size.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_SLICES = 3


class Address(NamedTuple):
    """Where a matrix begins: plane (0 = K, 1 = V), arena row of the adapter, element in that row."""

    plane: int
    row: int
    column: int


class Blocks(NamedTuple):
    """How a factor is cut into blocks along its long axis (see above); dense is ``Blocks(1, size, 0)``."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls on blocks
    size: int
    offset: int

    def bounds(self, index: int, length: int) -> tuple[int, int]:
        """Half-open interval of axis positions of block ``index`` on an axis of ``length`` positions."""
        start = index * self.size - self.offset
        return max(start, 0), min(start + self.size, length)


class SliceDescriptor(NamedTuple):
    """Where factor B of one slice lies. ``rank`` is the local rank (columns of h it reads); 0: not adapted."""

    rank: int
    h_start: int
    address: Address
    block_rank: int
    blocks: Blocks


class LinearDescriptor(NamedTuple):
    """Where one adapter's factors on one linear of one layer lie. ``h_width`` 0 means the linear is not adapted."""

    h_width: int
    a_rows: int
    address: Address
    blocks: Blocks
    slices: tuple[SliceDescriptor, ...]

    @property
    def largest_rank(self) -> int:
        """The largest local rank of a slice; 0 where nothing is adapted."""
        return max((s.rank for s in self.slices), default=0)

    def pack(self) -> list[int]:
        """The descriptor as ``DESCRIPTOR_FIELDS`` int32 values, absent slices as zeros: the kernels' table row."""
        row = [self.h_width, self.a_rows, *self.address, *self.blocks]
        for s in self.slices:
            row += [s.rank, s.h_start, *s.address, s.block_rank, *s.blocks]
        return row + [0] * (DESCRIPTOR_FIELDS - len(row))


HEAD_FIELDS = 8
SLICE_FIELDS = 9
DESCRIPTOR_FIELDS = HEAD_FIELDS + MAX_SLICES * SLICE_FIELDS
