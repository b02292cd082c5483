"""Triton kernel of expand: out += scaling * h times the transpose of the (block-diagonal) B of each token's adapter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from blocklora_kernels.addressing import adapter_rows, load_matrix
from blocklora_kernels.descriptor import HEAD_FIELDS, SLICE_FIELDS
from blocklora_kernels.division import ANY_VALUE, lanes_and_splits, owner_of, split_stride, tile_rows
from blocklora_kernels.shrink_kernel import H_VECTOR

HEAD = tl.constexpr(HEAD_FIELDS)
SLICE = tl.constexpr(SLICE_FIELDS)
GROUP = tl.constexpr(4)  # splits of h that are loaded at once


@triton.jit
def _sum_over_ranks(
    p_h,
    m_t,
    h_split_stride,
    splits,
    h_from,
    h_to,
    plane,
    slots,
    first_slot,
    row_stride,
    start,
    i_g,
    width,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """float32 [BLOCK_T, BLOCK_O]: columns [h_from, h_to) of the tile's h times columns ``i_g`` of the transpose of B.

    Whole vectors of h are loaded, from before ``h_from``; what is not the block's counts as zero.
    """
    acc = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for c in range(h_from // H_VECTOR * H_VECTOR, h_to, BLOCK_R):
        i_c = c + tl.arange(0, BLOCK_R)  # columns of h
        m_h = m_t[:, None] & (i_c // H_VECTOR * H_VECTOR < h_to)[None, :]
        h = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
        for first in range(0, splits, GROUP):
            i_s = first + tl.arange(0, GROUP)
            parts = p_h[None, :, None] + (i_s * h_split_stride)[:, None, None] + i_c[None, None, :]
            h += tl.sum(tl.load(parts, mask=m_h[None, :, :] & (i_s < splits)[:, None, None], other=0.0), axis=0)
        own = (i_c >= h_from) & (i_c < h_to)
        h = tl.where(own[None, :], h, 0.0)
        element = start + (i_c - h_from)[:, None] * width + i_g[None, :]
        m_b = own[:, None] & (i_g < width)[None, :]
        b = load_matrix(plane, slots, first_slot, row_stride, element, m_b, WIDTH, VECTOR)  # [BLOCK_R, BLOCK_O]
        acc = tl.dot(h.to(DTYPE), b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=ANY_VALUE)
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
    p_weights,
    out_stride,
    h_stride,
    row_stride,
    max_tiles,
    slots_stride,
    descriptors_stride,
    scalings_stride,
    out_1,
    out_2,
    out_3,
    slices,
    shares,
    most_splits,
    experts,
    experts_stride,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EXPERTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """A program takes every ``num_programs``-th item: one tile of tokens of one adapter, and a span of output chunks.

    Slices are the columns [0, out_1), [out_1, out_2), [out_2, out_3) of ``out``, which is updated in place; absent ones
    are empty. A chunk is ``BLOCK_O`` columns of one slice. The fewer tiles the batch holds, the shorter the spans:
    programs for all of them. ``slices``, ``shares``, ``most_splits`` and ``BLOCK_N`` are those of the shrink before.
    ``DEPENDENT``: that shrink may still run; what it began with is there, what it writes is not. ``EXPERTS``: as in
    shrink; with ``WEIGHTED`` each token's delta is multiplied with its number in ``p_weights``, float32.
    """
    chunks_1 = (out_1 + BLOCK_O - 1) // BLOCK_O
    chunks_2 = chunks_1 + (out_2 - out_1 + BLOCK_O - 1) // BLOCK_O
    chunks = chunks_2 + (out_3 - out_2 + BLOCK_O - 1) // BLOCK_O
    tiles = tl.load(p_tiles)
    _, splits = lanes_and_splits(p_tiles, slices, shares, most_splits, BLOCK_N)
    h_split_stride = split_stride(p_tiles, max_tiles, h_stride)
    span = tl.maximum((chunks * tiles + tl.num_programs(0) - 1) // tl.num_programs(0), 1)
    if DEPENDENT:
        gdc_wait()
    for item in range(tl.program_id(0), (chunks + span - 1) // span * tiles, tl.num_programs(0)):
        tile = item % tiles
        first_chunk = item // tiles * span
        adapter, expert = owner_of(p_tiles, tile, experts, EXPERTS)
        first_descriptor = p_descriptors + adapter.to(tl.int64) * descriptors_stride + HEAD
        p_scaling = p_scalings + adapter.to(tl.int64) * scalings_stride
        if EXPERTS:
            first_descriptor += expert * experts_stride
            p_scaling += expert * experts_stride
        slots, first_slot = adapter_rows(p_slots, p_first_slots, adapter, slots_stride)
        i_t, m_t = tile_rows(p_tiles, max_tiles, tile, BLOCK_T)
        token = tl.load(p_tokens + i_t, mask=m_t, other=0).to(tl.int64)
        p_h_t = p_h + i_t * h_stride  # [BLOCK_T], int32: the scratch has less than 2**31 elements
        for chunk in range(first_chunk, tl.minimum(first_chunk + span, chunks)):
            s = (chunk >= chunks_1).to(tl.int32) + (chunk >= chunks_2).to(tl.int32)
            d = first_descriptor + s * SLICE
            if tl.load(d) > 0:
                h_start = tl.load(d + 1)
                plane = tl.where(tl.load(d + 2) == 0, p_k, p_v)
                start = tl.load(d + 3) * WIDTH + tl.load(d + 4)
                block_rank = tl.load(d + 5)
                blocks = tl.load(d + 6)
                size = tl.load(d + 7)
                offset = tl.load(d + 8)
                scaling = tl.load(p_scaling + s)
                out_start = tl.where(s == 0, 0, tl.where(s == 1, out_1, out_2))
                width = tl.where(s == 0, out_1, tl.where(s == 1, out_2 - out_1, out_3 - out_2))
                o_start = (chunk - tl.where(s == 0, 0, tl.where(s == 1, chunks_1, chunks_2))) * BLOCK_O
                i_o = o_start + tl.arange(0, BLOCK_O)
                i_g = o_start + tl.arange(0, BLOCK_O // VECTOR) * VECTOR
                last = tl.minimum(o_start + BLOCK_O, width) - 1
                acc = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
                # Padding of a TP rank's share lies behind the last block: it has no columns of h.
                for block in range((offset + o_start) // size, tl.minimum((offset + last) // size + 1, blocks)):
                    h_from = h_start + block * block_rank
                    part = _sum_over_ranks(
                        p_h_t, m_t, h_split_stride, splits, h_from, h_from + block_rank, plane, slots, first_slot,
                        row_stride, start, i_g, width, WIDTH, VECTOR, BLOCK_T, BLOCK_O, BLOCK_R,
                        p_out.dtype.element_ty,
                    )  # fmt: skip
                    acc = tl.where(((offset + i_o) // size == block)[None, :], part, acc)
                if WEIGHTED:
                    acc *= tl.load(p_weights + token, mask=m_t, other=0.0)[:, None]
                p_o = p_out + token[:, None] * out_stride + out_start + i_o[None, :]
                m_out = m_t[:, None] & (i_o < width)[None, :]
                out = tl.load(p_o, mask=m_out, other=0.0).to(tl.float32)
                tl.store(p_o, (out + scaling * acc).to(p_out.dtype.element_ty), mask=m_out)
