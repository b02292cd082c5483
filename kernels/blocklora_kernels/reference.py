"""Defines shrink and expand in torch: what the kernels are checked against, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor


class ExpandFactor(NamedTuple):
    """Factor B of one slice as a tensor: ``weight`` [out_s, block_rank], its place in h and out, its scaling."""

    weight: torch.Tensor
    h_start: int
    block_rank: int
    blocks: Blocks
    out_start: int
    scaling: float


class LinearFactors(NamedTuple):
    """One adapter's factors on one linear, as tensors: ``a`` [a_rows, in] and an ``ExpandFactor`` per adapted slice."""

    h_width: int
    a: torch.Tensor
    a_blocks: Blocks
    slices: tuple[ExpandFactor, ...]


def read_matrix(
    planes: Sequence[torch.Tensor], slots: torch.Tensor, address: Address, rows: int, columns: int
) -> torch.Tensor:
    """The matrix [rows, columns] at ``address`` of an adapter that holds ``slots``.

    planes  K and V rows of one layer, each [slots of the arena, W]
    slots   int64 [S], the adapter's physical rows in order
    A view of the arena where the rows it needs are adjacent, a copy otherwise.
    """
    plane = planes[address.plane]
    width = plane.shape[1]
    size = rows * columns
    last_row = address.row + max(address.column + size - 1, 0) // width
    needed = slots[address.row : last_row + 1]
    first = int(needed[0])
    if int(needed[-1]) - first == len(needed) - 1 and bool((needed.diff() == 1).all()):
        flat = plane[first : first + len(needed)].view(-1)
    else:
        flat = plane[needed].view(-1)
    return flat[address.column : address.column + size].view(rows, columns)


def read_linear(
    descriptor: LinearDescriptor,
    scalings: Sequence[float],
    planes: Sequence[torch.Tensor],
    slots: torch.Tensor,
    in_features: int,
    out_offsets: Sequence[int],
) -> LinearFactors:
    """Resolve a descriptor to tensors.

    in_features  local input width
    out_offsets  [slices + 1], where each slice's output columns start and end on this TP rank
    scalings     alpha / r (or alpha / sqrt(r)) of each slice, r the full rank
    """
    slices = tuple(
        ExpandFactor(
            read_matrix(planes, slots, s.address, s.block_rank, out_offsets[i + 1] - out_offsets[i]).t(),
            s.h_start,
            s.block_rank,
            s.blocks,
            out_offsets[i],
            scalings[i],
        )
        for i, s in enumerate(descriptor.slices)
        if s.rank
    )
    a = read_matrix(planes, slots, descriptor.address, descriptor.a_rows, in_features)
    return LinearFactors(descriptor.h_width, a, descriptor.blocks, slices)


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Itself, or its copy in float32 where it has 16 bits.

    A CPU without instructions for 16-bit products takes ten times as long for them, and up to a hundred times where the
    right factor's rows are adjacent. Triton's kernels add up in float32 too.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def add_product_(out: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scaling: float = 1.0) -> None:
    """Add ``scaling * h b`` to ``out`` [T, out_s] in place; ``h`` is [T, r] and ``b`` is [r, out_s], of one dtype.

    Rounded once where ``out`` has fewer bits than they.
    """
    if out.dtype == h.dtype:
        out.addmm_(h, b, alpha=scaling)
    else:
        out.add_(h @ b, alpha=scaling)


def shrink(x: torch.Tensor, factors: LinearFactors) -> torch.Tensor:
    """h [T, h_width] = x [T, in] times the (block-diagonal) A, for tokens of one adapter; dtype of x."""
    length, inputs, a = x.shape[1], wide(x), wide(factors.a)
    bounds = [factors.a_blocks.bounds(i, length) for i in range(factors.a_blocks.count)]
    parts = [inputs[:, start:stop] @ a[:, start:stop].t() for start, stop in bounds]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(x.dtype)


def look_up(ids: torch.Tensor, factors: LinearFactors) -> torch.Tensor:
    """h [T, h_width] for tokens whose input is one 1 among zeros, at columns ``ids`` (int64 [T]) of a dense A."""
    return factors.a[:, ids].t()


def expand_(out: torch.Tensor, h: torch.Tensor, factors: LinearFactors) -> None:
    """Add ``scaling * h B^T`` of every slice to ``out`` [T, all outputs] in place, for tokens of one adapter."""
    h = wide(h)
    for s in factors.slices:
        length, b = s.weight.shape[0], wide(s.weight.t())
        for i in range(s.blocks.count):
            start, stop = s.blocks.bounds(i, length)
            own = h[:, s.h_start + i * s.block_rank : s.h_start + (i + 1) * s.block_rank]
            add_product_(out[:, s.out_start + start : s.out_start + stop], own, b[:, start:stop], s.scaling)


def add_delta_(out: torch.Tensor, x: torch.Tensor, rows: slice | torch.Tensor, factors: LinearFactors) -> None:
    """Add one adapter's delta to its token rows of ``out`` [tokens, out]; ``x`` is [tokens, in].

    rows  the adapter's tokens: a slice (worked on in place) or int64 indices (gathered and written back)
    """
    part = out[rows]
    expand_(part, shrink(x[rows], factors), factors)
    if not isinstance(rows, slice):
        out[rows] = part
