"""Multiplies several adapters' factors of one linear at once, in torch: the CPU path where a batch has few tokens.

All tokens meet the A of all adapters, what is not a token's own adapter is set to zero in h, and all of h meets all B:
one product for shrink and one a slice for expand, however many adapters. That computes more and calls less; a CPU takes
longer to call a product of a few rows than to compute it. Copies are of float32 (``reference.wide``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from blocklora_kernels.reference import ExpandFactor, LinearFactors, add_product_, wide


class StackedSlice(NamedTuple):
    """B of one slice: ``columns`` of h times ``b`` [columns, out_s] are added to ``outputs`` of out."""

    columns: slice
    outputs: slice
    b: torch.Tensor


class StackedFactors(NamedTuple):
    """Factors of one linear of several adapters.

    a         [R, in], float32 as all of it (float64 where the factors are)
    slices    in the order of their rows of ``a``
    scalings  float32 [R], each row's
    owners    int64 [R], each row's adapter
    """

    a: torch.Tensor
    slices: tuple[StackedSlice, ...]
    scalings: torch.Tensor
    owners: torch.Tensor


def stack(factors: Sequence[LinearFactors | None]) -> StackedFactors | None:
    """Copies of one linear's factors, those of a slice adjacent; entry i belongs to adapter i, None: it has none.

    Blocks are written out with zeros between them. None where nothing is adapted.
    """
    rows, slices, scalings, owners, stop = [], [], [], [], 0
    for out_start in sorted({s.out_start for own in factors if own is not None for s in own.slices}):
        parts, start = [], stop
        for adapter, own in enumerate(factors):
            for s in own.slices if own is not None else ():
                if own is None or s.out_start != out_start:
                    continue
                columns = slice(s.h_start, s.h_start + s.block_rank * s.blocks.count)
                rows.append(_dense_a(own)[columns])
                parts.append(_dense_b(s))
                scalings += [s.scaling] * len(rows[-1])
                owners += [adapter] * len(rows[-1])
                stop += len(rows[-1])
        b = wide(torch.cat(parts))
        slices.append(StackedSlice(slice(start, stop), slice(out_start, out_start + b.shape[1]), b))
    if not rows:
        return None
    return StackedFactors(wide(torch.cat(rows)), tuple(slices), torch.tensor(scalings), torch.tensor(owners))


def stacked_bytes(factors: LinearFactors) -> int:
    """Bytes of one adapter's copy in ``stack``: with blocks written out, more than its rows of the arena have."""
    size = factors.h_width * factors.a.shape[1]
    size += sum(s.block_rank * s.blocks.count * s.weight.shape[0] for s in factors.slices)
    return size * torch.promote_types(factors.a.dtype, torch.float32).itemsize


def foreign(adapters: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Bool [T, R]: which columns of h are not of a token's own adapter; ``adapters`` int64 [T], negative for none."""
    return adapters[:, None] != owners


def add_deltas_(out: torch.Tensor, x: torch.Tensor, factors: StackedFactors, foreign: torch.Tensor) -> None:
    """Add each token's own delta to ``out`` [T, all outputs] in place; ``x`` is [T, in], ``foreign`` is [T, R].

    What a foreign adapter makes of a token is dropped whatever it is, infinite or no number too; B is finite.
    """
    h = wide(x) @ factors.a.t()
    h.masked_fill_(foreign, 0)
    torch.mul(h, factors.scalings, out=h)
    for columns, outputs, b in factors.slices:
        add_product_(out[:, outputs], h[:, columns], b)


def _dense_a(factors: LinearFactors) -> torch.Tensor:
    """[h_width, in]: row-parallel blocks of A in rows of their own."""
    if factors.a_blocks.count == 1:
        return factors.a
    a_rows, length = factors.a.shape
    dense = factors.a.new_zeros(factors.h_width, length)
    for i in range(factors.a_blocks.count):
        start, stop = factors.a_blocks.bounds(i, length)
        dense[i * a_rows : (i + 1) * a_rows, start:stop] = factors.a[:, start:stop]
    return dense


def _dense_b(factor: ExpandFactor) -> torch.Tensor:
    """[columns of h, out_s] of one slice: each block in the rows of its own columns."""
    if factor.blocks.count == 1:
        return factor.weight.t()
    length = factor.weight.shape[0]
    dense = factor.weight.new_zeros(factor.blocks.count * factor.block_rank, length)
    for i in range(factor.blocks.count):
        start, stop = factor.blocks.bounds(i, length)
        dense[i * factor.block_rank : (i + 1) * factor.block_rank, start:stop] = factor.weight[start:stop].t()
    return dense
