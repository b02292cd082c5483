"""Triton kernel of expand: out += scaling * h times the transpose of the (block-diagonal) B of each token's adapter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl

from blocklora_kernels.addressing import adapter_rows, load_matrix, tile_rows
from blocklora_kernels.descriptor import HEAD_FIELDS, SLICE_FIELDS

HEAD = tl.constexpr(HEAD_FIELDS)
SLICE = tl.constexpr(SLICE_FIELDS)
NARROW = tl.constexpr(16)  # ranks at a time of a matrix that is not aligned: an address per element costs registers


@triton.jit
def _sum_over_ranks(
    acc,
    p_h,
    i_h,
    m_t,
    h_split_stride,
    plane,
    slots,
    first_slot,
    row_stride,
    start,
    i_o,
    m_o,
    block_rank,
    WIDTH: tl.constexpr,
    GRANULE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Add h [BLOCK_T, block_rank] times rows ``i_o`` of B (those of one block, ``m_o``) to acc [BLOCK_T, BLOCK_O]."""
    for r in range(0, block_rank, BLOCK_R):
        i_r = r + tl.arange(0, BLOCK_R)
        m_h = m_t[:, None] & (i_r < block_rank)[None, :]
        parts = (i_h[:, None] + i_r[None, :])[None, :, :] + tl.arange(0, SPLITS)[:, None, None] * h_split_stride
        h = tl.sum(tl.load(p_h + parts, mask=m_h[None, :, :], other=0.0), axis=0)  # float32 [BLOCK_T, BLOCK_R]
        i_g = r + tl.arange(0, BLOCK_R // GRANULE) * GRANULE
        element = start + i_o[:, None] * block_rank + i_g[None, :]
        m_b = m_o[:, None] & (i_g < block_rank)[None, :]
        b = load_matrix(plane, slots, first_slot, row_stride, element, m_b, WIDTH, GRANULE)  # [BLOCK_O, BLOCK_R]
        acc = tl.dot(h.to(DTYPE), tl.trans(b), acc, input_precision="ieee")
    return acc


@triton.jit
def expand_kernel(
    p_out,
    p_h,
    p_k,
    p_v,
    p_tiles,
    p_tokens,
    p_slots,
    p_first_slots,
    p_descriptors,
    p_scalings,
    out_stride,
    h_split_stride,
    h_stride,
    row_stride,
    max_tiles,
    slots_stride,
    descriptors_stride,
    scalings_stride,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    OUT_3: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: one tile of tokens of one adapter, ``BLOCK_O`` output columns of one slice, updated in place.

    Slices are the columns [0, OUT_1), [OUT_1, OUT_2), [OUT_2, OUT_3); absent ones are empty. The grid is ``max_tiles``
    times the column chunks of all slices; programs beyond ``tiles[0]``, or of a slice with rank 0, return.
    """
    CHUNKS_1: tl.constexpr = (OUT_1 + BLOCK_O - 1) // BLOCK_O
    CHUNKS_2: tl.constexpr = CHUNKS_1 + (OUT_2 - OUT_1 + BLOCK_O - 1) // BLOCK_O
    CHUNKS_3: tl.constexpr = CHUNKS_2 + (OUT_3 - OUT_2 + BLOCK_O - 1) // BLOCK_O
    tile = tl.program_id(0) // CHUNKS_3
    chunk = tl.program_id(0) % CHUNKS_3
    if tile >= tl.load(p_tiles):
        return
    adapter = tl.load(p_tiles + 1 + tile)
    s = (chunk >= CHUNKS_1).to(tl.int32) + (chunk >= CHUNKS_2).to(tl.int32)
    d = p_descriptors + adapter.to(tl.int64) * descriptors_stride + HEAD + s * SLICE
    if tl.load(d) == 0:
        return
    h_start = tl.load(d + 1)
    plane = tl.where(tl.load(d + 2) == 0, p_k, p_v)
    start = tl.load(d + 3) * WIDTH + tl.load(d + 4)
    block_rank = tl.load(d + 5)
    size = tl.load(d + 7)
    offset = tl.load(d + 8)
    slots, first_slot = adapter_rows(p_slots, p_first_slots, adapter, slots_stride)
    scaling = tl.load(p_scalings + adapter.to(tl.int64) * scalings_stride + s)
    aligned = (start | block_rank) % VECTOR == 0

    i_t, m_t = tile_rows(p_tiles, max_tiles, tile, BLOCK_T)
    i_h = i_t * h_stride + h_start  # [BLOCK_T], int32: the scratch has less than 2**31 elements

    first_chunk = tl.where(s == 0, 0, tl.where(s == 1, CHUNKS_1, CHUNKS_2))
    out_start = tl.where(s == 0, 0, tl.where(s == 1, OUT_1, OUT_2))
    width = tl.where(s == 0, OUT_1, tl.where(s == 1, OUT_2 - OUT_1, OUT_3 - OUT_2))
    o_start = (chunk - first_chunk) * BLOCK_O
    i_o = o_start + tl.arange(0, BLOCK_O)  # rows of B
    last = tl.minimum(o_start + BLOCK_O, width) - 1
    acc = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for block in range((offset + o_start) // size, (offset + last) // size + 1):
        m_o = (i_o < width) & ((offset + i_o) // size == block)
        i_h_block = i_h + block * block_rank
        if aligned:
            acc = _sum_over_ranks(
                acc, p_h, i_h_block, m_t, h_split_stride, plane, slots, first_slot, row_stride, start, i_o, m_o,
                block_rank, WIDTH, VECTOR, SPLITS, BLOCK_R, p_out.dtype.element_ty,
            )  # fmt: skip
        else:
            acc = _sum_over_ranks(
                acc, p_h, i_h_block, m_t, h_split_stride, plane, slots, first_slot, row_stride, start, i_o, m_o,
                block_rank, WIDTH, 1, SPLITS, NARROW, p_out.dtype.element_ty,
            )  # fmt: skip

    token = tl.load(p_tokens + i_t, mask=m_t, other=0).to(tl.int64)
    p_o = p_out + token[:, None] * out_stride + out_start + i_o[None, :]
    m_out = m_t[:, None] & (i_o < width)[None, :]
    out = tl.load(p_o, mask=m_out, other=0.0).to(tl.float32)
    tl.store(p_o, (out + scaling * acc).to(p_out.dtype.element_ty), mask=m_out)
