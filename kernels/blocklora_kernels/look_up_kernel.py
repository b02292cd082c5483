"""Triton kernel of look-up: h = the columns of each token's adapter's A that token ids pick (embeddings)."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl

from blocklora_kernels.addressing import adapter_rows, load_matrix
from blocklora_kernels.division import ANY_VALUE, HEADER, tile_rows


@triton.jit(do_not_specialize=ANY_VALUE)
def look_up_kernel(
    p_ids,
    p_h,
    p_k,
    p_v,
    p_tiles,
    p_tokens,
    p_slots,
    p_first_slots,
    p_descriptors,
    h_stride,
    row_stride,
    max_tiles,
    slots_stride,
    descriptors_stride,
    in_features,
    first_id,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program takes every ``num_programs``-th tile, and skips tokens whose ids are not in [first_id, + in_features).

    Writes no zeros: h is zero where no part of the vocabulary writes.
    """
    for tile in range(tl.program_id(0), tl.load(p_tiles), tl.num_programs(0)):
        adapter = tl.load(p_tiles + HEADER + tile)
        d = p_descriptors + adapter.to(tl.int64) * descriptors_stride
        a_rows = tl.where(tl.load(d) > 0, tl.load(d + 1), 0)
        plane = tl.where(tl.load(d + 2) == 0, p_k, p_v)
        start = tl.load(d + 3) * WIDTH + tl.load(d + 4)
        slots, first_slot = adapter_rows(p_slots, p_first_slots, adapter, slots_stride)
        i_t, m_t = tile_rows(p_tiles, max_tiles, tile, BLOCK_T)
        token = tl.load(p_tokens + i_t, mask=m_t, other=0)
        column = tl.load(p_ids + token, mask=m_t, other=-1).to(tl.int32) - first_id
        own = m_t & (column >= 0) & (column < in_features)
        for first in range(0, a_rows, BLOCK_N):
            i_n = first + tl.arange(0, BLOCK_N)
            mask = own[:, None] & (i_n < a_rows)[None, :]
            element = start + i_n[None, :] * in_features + column[:, None]
            a = load_matrix(plane, slots, first_slot, row_stride, element, mask, WIDTH, 1)
            tl.store(p_h + (i_t * h_stride)[:, None] + i_n[None, :], a.to(tl.float32), mask=mask)
