"""Triton kernel of shrink: h = x times the (block-diagonal) A of each token's adapter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from blocklora_kernels.addressing import adapter_rows, granules, load_matrix
from blocklora_kernels.division import ANY_VALUE, lanes_and_splits, owner_of, split_stride, tile_rows

H_VECTOR = tl.constexpr(4)  # float32 of h that expand loads at once


@triton.jit
def _sum_over_columns(
    p_x,
    m_t,
    plane,
    slots,
    first_slot,
    row_stride,
    start,
    i_n,
    a_rows,
    in_features,
    k_start,
    k_stop,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_T, BLOCK_N]: columns [k_start, k_stop) of the tile's x times those of rows ``i_n`` of A."""
    acc = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    i_v = tl.arange(0, BLOCK_K // VECTOR) * VECTOR
    for k in range(k_start, k_stop, BLOCK_K):
        i_g = k + i_v  # [BLOCK_K / VECTOR]
        m_g = i_g < k_stop
        x = granules(p_x[:, None] + i_g[None, :], m_t[:, None] & m_g[None, :], VECTOR)  # [BLOCK_T, BLOCK_K]
        element = start + i_n[:, None] * in_features + i_g[None, :]
        m_a = (i_n < a_rows)[:, None] & m_g[None, :]
        a = load_matrix(plane, slots, first_slot, row_stride, element, m_a, WIDTH, VECTOR)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=ANY_VALUE)
def shrink_kernel(
    p_x,
    p_h,
    p_k,
    p_v,
    p_tiles,
    p_tokens,
    p_slots,
    p_first_slots,
    p_descriptors,
    x_stride,
    h_stride,
    row_stride,
    max_tiles,
    slots_stride,
    descriptors_stride,
    in_features,
    slices,
    shares,
    most_splits,
    experts,
    experts_stride,
    choices,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """A program takes every ``num_programs``-th item: one tile of tokens, one split of the columns, one lane.

    A lane is every ``lanes``-th chunk of ``BLOCK_N`` rows of A. Partial sums go to ``h[split]``; expand adds the splits
    in order, so a result does not depend on timing. Lanes are the slowest index, so that those beyond an adapter's
    rank, which have nothing to do, lie at the end. ``DEPENDENT``: expand may be launched by now. ``EXPERTS``: a tile is
    of one adapter and one expert, whose descriptors lie ``experts_stride`` apart; ``choices`` tokens have one row of x.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    tiles = tl.load(p_tiles)
    lanes, splits = lanes_and_splits(p_tiles, slices, shares, most_splits, BLOCK_N)
    h_split_stride = split_stride(p_tiles, max_tiles, h_stride)
    for item in range(tl.program_id(0), lanes * splits * tiles, tl.num_programs(0)):
        tile = item % tiles
        split = item // tiles % splits
        lane = item // tiles // splits
        adapter, expert = owner_of(p_tiles, tile, experts, EXPERTS)
        d = p_descriptors + adapter.to(tl.int64) * descriptors_stride
        if EXPERTS:
            d += expert * experts_stride
        h_width = tl.load(d)
        a_rows = tl.where(h_width > 0, tl.load(d + 1), 0)
        plane = tl.where(tl.load(d + 2) == 0, p_k, p_v)
        start = tl.load(d + 3) * WIDTH + tl.load(d + 4)
        blocks = tl.load(d + 5)
        size = tl.load(d + 6)
        offset = tl.load(d + 7)
        slots, first_slot = adapter_rows(p_slots, p_first_slots, adapter, slots_stride)

        i_t, m_t = tile_rows(p_tiles, max_tiles, tile, BLOCK_T)
        row = tl.load(p_tokens + i_t, mask=m_t, other=0)
        if EXPERTS:
            row = row // choices
        p_x_t = p_x + row.to(tl.int64) * x_stride  # [BLOCK_T]
        chunks_per_block = (a_rows + BLOCK_N - 1) // BLOCK_N
        for chunk in range(lane, chunks_per_block * blocks, lanes):
            block = chunk // chunks_per_block
            i_n = (chunk % chunks_per_block) * BLOCK_N + tl.arange(0, BLOCK_N)  # rows of A
            k_from = tl.maximum(block * size - offset, 0)
            k_to = tl.minimum((block + 1) * size - offset, in_features)
            # A split is a whole number of column tiles; the last ones may be empty, and then write zeros.
            share = ((k_to - k_from + splits - 1) // splits + BLOCK_K - 1) // BLOCK_K * BLOCK_K
            k_start = k_from + split * share
            acc = _sum_over_columns(
                p_x_t, m_t, plane, slots, first_slot, row_stride, start, i_n, a_rows, in_features, k_start,
                tl.minimum(k_start + share, k_to), WIDTH, VECTOR, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            # The last columns are filled up with zeros, which expand loads with them.
            i_h = block * a_rows + i_n
            filled = tl.where(block == blocks - 1, (h_width + H_VECTOR - 1) // H_VECTOR * H_VECTOR, 0)
            m_n = (i_n < a_rows) | ((i_h >= h_width) & (i_h < filled))
            p_h_t = p_h + split * h_split_stride + i_t * h_stride  # int32: the scratch has less than 2**31 elements
            tl.store(p_h_t[:, None] + i_h[None, :], acc, mask=m_t[:, None] & m_n[None, :])
