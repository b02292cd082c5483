"""Finds the diagonal blocks that a TP rank's part of an axis touches."""

from __future__ import annotations

from typing import NamedTuple

from blocklora_kernels.descriptor import Blocks

from sglang_blocklora.sharding.linears import Interval


class TouchedBlocks(NamedTuple):
    """Blocks ``[first, first + blocks.count)`` of the axis, and how they run along the rank's own positions."""

    first: int
    blocks: Blocks


def touched_blocks(interval: Interval, nblocks: int) -> TouchedBlocks:
    """Blocks of an axis cut into ``nblocks`` equal parts that ``interval`` touches.

    ``interval.size`` must be a multiple of ``nblocks`` (checked when the adapter is read) and the interval not empty.
    n divides by N: n/N whole blocks; N divides by n: part of one block; neither: up to ceil(n/N) + 1, the outer ones
    cut. ``Blocks.offset`` is how far into the first block the interval starts.
    """
    size = interval.size // nblocks
    first = interval.start // size
    last = (interval.stop - 1) // size
    return TouchedBlocks(first, Blocks(last - first + 1, size, interval.start - first * size))
