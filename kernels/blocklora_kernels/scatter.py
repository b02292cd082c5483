"""Writes rows of an image to an adapter's slots, in all layers and both planes, with one launch."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

WORD_BYTES = 4
BLOCK_ROWS = 8
BLOCK_WORDS = 256  # by 4 bytes: 1 KiB of a row at a time, 16 bytes a thread


@triton.jit(do_not_specialize=["first", "count", "slots_each"])
def scatter_kernel(
    p_planes,  # int64 [planes], addresses of the planes
    p_slots,  # int64 [slots_each]
    p_rows,  # int32 [count, WORDS]
    first,  # which row of the image p_rows begins with
    count,
    slots_each,
    row_stride,  # words between rows of a plane
    WORDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = i_r < count
    row = first + i_r
    plane = tl.load(p_planes + row // slots_each, mask=m_r, other=0).to(tl.pointer_type(tl.int32))
    slot = tl.load(p_slots + row % slots_each, mask=m_r, other=0)
    p_to = plane + slot * row_stride
    p_from = p_rows + i_r.to(tl.int64) * WORDS
    for start in range(0, WORDS, BLOCK_W):
        i_w = start + tl.arange(0, BLOCK_W)
        mask = m_r[:, None] & (i_w < WORDS)[None, :]
        words = tl.load(p_from[:, None] + i_w[None, :], mask=mask, other=0)
        # Planes and their rows start on 16 bytes, which cannot be seen from an address in memory.
        to = tl.max_contiguous(tl.multiple_of(p_to[:, None] + i_w[None, :], (1, 16)), (1, 4))
        tl.store(to, words, mask=mask)


class RowScatter:
    """The planes of an arena, to which rows of images are written.

    Holds the planes' addresses; they belong to the caller and stay where they are.
    """

    def __init__(self, planes: Sequence[Sequence[torch.Tensor]]) -> None:
        """``planes[layer]`` is (K, V), each [slots, W], all alike; rows start on multiples of 16 bytes."""
        flat = [plane for layer in planes for plane in layer]
        size = flat[0].element_size()
        self._words = flat[0].shape[1] * size // WORD_BYTES
        self._row_stride = flat[0].stride(0) * size // WORD_BYTES
        addresses = [plane.data_ptr() for plane in flat]
        if any(value % 16 for value in addresses) or self._row_stride % 4 or self._words % 4:
            raise ValueError("planes: expected rows that start on, and are, multiples of 16 bytes")
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=flat[0].device)

    def compile(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Launch without rows, so that nothing is compiled while a server runs; arguments as for ``write``."""
        self._launch(slots, rows, 0, 0, 1)

    def write(self, slots: torch.Tensor, rows: torch.Tensor, first: int, slots_each: int) -> None:
        """Write a part of a packed image [layers, 2, S, W]; ordered with the current stream's work.

        slots       int64 [at least S] on the planes' device
        rows        [n, W], contiguous, on the planes' device: rows ``first`` to ``first + n`` of the image, counted
                    through its layers and planes
        slots_each  S
        """
        self._launch(slots, rows, first, len(rows), slots_each)

    def _launch(self, slots: torch.Tensor, rows: torch.Tensor, first: int, count: int, slots_each: int) -> None:
        scatter_kernel[(max(-(-count // BLOCK_ROWS), 1),)](
            self._addresses,
            slots,
            rows.view(torch.int32),
            first,
            count,
            slots_each,
            self._row_stride,
            WORDS=self._words,
            BLOCK_R=BLOCK_ROWS,
            BLOCK_W=BLOCK_WORDS,
        )
