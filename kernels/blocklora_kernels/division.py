"""Device functions that divide a batch's work among the programs of a launch, as both kernels must see it alike.

A grid holds a few programs for each multiprocessor, whatever the batch; the programs loop over what ``tiles`` tells.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Kernels are Triton's dialect: their arguments have no Python types.

import triton
import triton.language as tl

from blocklora_kernels.batch import HEADER_FIELDS

# Arguments of the kernels that differ between batches or buffers: compiled once for any value.
ANY_VALUE = (
    *("max_tiles", "slots_stride", "descriptors_stride", "scalings_stride", "slices", "shares", "most_splits"),
    *("experts", "experts_stride", "choices", "first_id"),
)
HEADER = tl.constexpr(HEADER_FIELDS)


@triton.jit
def lanes_and_splits(p_tiles, slices, shares, most_splits, BLOCK_N: tl.constexpr):
    """How many programs share the chunks of h of one tile (lanes), and into how many parts each cuts its columns.

    ``shares`` is how many pieces fill the GPU: few tiles are cut into many parts, many tiles are not cut at all. h has
    ``splits`` rows for each position; that is at most ``tiles.scratch_rows``.
    """
    lanes = tl.maximum((tl.load(p_tiles + 1) * slices + BLOCK_N - 1) // BLOCK_N, 1)
    pieces = tl.maximum(tl.load(p_tiles), 1) * lanes
    return lanes, tl.minimum(tl.maximum(shares // pieces, 1), most_splits)


@triton.jit
def split_stride(p_tiles, max_tiles, h_stride):
    """Elements between two splits of h: the adapted tokens of the batch (where its last tile stops) times its width."""
    last = tl.maximum(tl.load(p_tiles) - 1, 0)
    return tl.load(p_tiles + HEADER + 2 * max_tiles + last) * h_stride


@triton.jit
def owner_of(p_tiles, tile, experts, EXPERTS: tl.constexpr):
    """Whose a tile is: the adapter, and of a layer of experts the expert (``experts.py`` numbers both in one)."""
    owner = tl.load(p_tiles + HEADER + tile)
    if EXPERTS:
        return owner // experts, owner % experts
    return owner, 0


@triton.jit
def tile_rows(p_tiles, max_tiles, tile, BLOCK_T: tl.constexpr):
    """Positions of a tile's tokens among the adapted ones [BLOCK_T], and which of them there are."""
    i_t = tl.load(p_tiles + HEADER + max_tiles + tile) + tl.arange(0, BLOCK_T)
    return i_t, i_t < tl.load(p_tiles + HEADER + 2 * max_tiles + tile)
