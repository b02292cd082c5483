"""Triton kernel of shrink: h = x times the (block-diagonal) A of each token's adapter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl

from blocklora_kernels.addressing import adapter_rows, granules, load_matrix, tile_rows

NARROW = tl.constexpr(16)  # columns at a time of a matrix that is not aligned: an address per element costs registers


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
    GRANULE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_T, BLOCK_N]: columns [k_start, k_stop) of the tile's x times those of rows ``i_n`` of A."""
    acc = tl.full((BLOCK_T, BLOCK_N), 0.0, tl.float32)
    i_g = tl.arange(0, BLOCK_K // GRANULE) * GRANULE
    for k in range(k_start, k_stop, BLOCK_K):
        i_k = k + i_g  # [BLOCK_K / GRANULE]
        m_k = i_k < k_stop
        x = granules(p_x[:, None] + i_k[None, :], m_t[:, None] & m_k[None, :], GRANULE)  # [BLOCK_T, BLOCK_K]
        element = start + i_n[:, None] * in_features + i_k[None, :]
        m_a = (i_n < a_rows)[:, None] & m_k[None, :]
        a = load_matrix(plane, slots, first_slot, row_stride, element, m_a, WIDTH, GRANULE)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    return acc


@triton.jit
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
    h_split_stride,
    h_stride,
    row_stride,
    max_tiles,
    slots_stride,
    descriptors_stride,
    in_features,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: one tile of tokens, one of ``SPLITS`` parts of the columns, every ``LANES``-th chunk of h.

    Writes its partial sums to ``h[split]``; expand adds the splits, in order, so a result does not depend on timing.
    The grid is ``max_tiles * LANES * SPLITS`` programs, whatever the batch holds: those beyond ``tiles[0]`` return.
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    lane = pid // SPLITS % LANES
    tile = pid // (SPLITS * LANES)
    if tile >= tl.load(p_tiles):
        return
    adapter = tl.load(p_tiles + 1 + tile)
    d = p_descriptors + adapter.to(tl.int64) * descriptors_stride
    h_width = tl.load(d)
    if h_width == 0:
        return
    a_rows = tl.load(d + 1)
    plane = tl.where(tl.load(d + 2) == 0, p_k, p_v)
    start = tl.load(d + 3) * WIDTH + tl.load(d + 4)
    blocks = tl.load(d + 5)
    size = tl.load(d + 6)
    offset = tl.load(d + 7)
    slots, first_slot = adapter_rows(p_slots, p_first_slots, adapter, slots_stride)
    aligned = (start | size | offset) % VECTOR == 0

    i_t, m_t = tile_rows(p_tiles, max_tiles, tile, BLOCK_T)
    p_x_t = p_x + tl.load(p_tokens + i_t, mask=m_t, other=0).to(tl.int64) * x_stride  # [BLOCK_T]
    chunks_per_block = (a_rows + BLOCK_N - 1) // BLOCK_N
    for chunk in range(lane, chunks_per_block * blocks, LANES):
        block = chunk // chunks_per_block
        i_n = (chunk % chunks_per_block) * BLOCK_N + tl.arange(0, BLOCK_N)  # rows of A
        k_block = tl.maximum(block * size - offset, 0)
        k_end = tl.minimum((block + 1) * size - offset, in_features)
        # A split is a whole number of column tiles; the last ones may be empty, and then write zeros.
        share = (k_end - k_block + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
        k_start = k_block + split * share
        k_stop = tl.minimum(k_start + share, k_end)
        if aligned:
            acc = _sum_over_columns(
                p_x_t, m_t, plane, slots, first_slot, row_stride, start, i_n, a_rows, in_features, k_start, k_stop,
                WIDTH, VECTOR, BLOCK_T, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = _sum_over_columns(
                p_x_t, m_t, plane, slots, first_slot, row_stride, start, i_n, a_rows, in_features, k_start, k_stop,
                WIDTH, 1, BLOCK_T, BLOCK_N, NARROW,
            )  # fmt: skip
        i_h = split * h_split_stride + i_t * h_stride  # int32: the scratch has less than 2**31 elements
        m_h = m_t[:, None] & (i_n < a_rows)[None, :]
        tl.store(p_h + i_h[:, None] + block * a_rows + i_n[None, :], acc, mask=m_h)
