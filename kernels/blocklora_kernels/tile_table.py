"""Tiles by architecture. Data only: ``benchmark/kernels/tune.py`` rewrites this file on a GPU, ``tiles.py`` reads it.

An architecture ("sm_90") without an entry uses "default". In each list the first entry whose limits hold is taken;
a limit of None always holds.

TILINGS   (tokens of the batch, block_tokens, splits), splits a power of two
SHRINK  (block_tokens, rank, input width, block_n, block_k, lanes, warps, stages)
EXPAND  (block_tokens, rank, output width, block_o, block_r, warps, stages)

"default" is reasoned, not measured (docs/kernels.md says how).
"""

TILINGS: dict[str, list[tuple[int | None, int, int]]] = {
    "default": [
        (256, 16, 8),
        (4096, 64, 4),
        (8192, 64, 2),
        (None, 64, 1),
    ],
}

SHRINK: dict[str, list[tuple[int, int | None, int | None, int, int, int, int, int]]] = {
    "default": [
        (16, None, 1024, 16, 64, 4, 4, 5),
        (16, 16, 8192, 16, 128, 4, 4, 7),
        (16, None, 8192, 16, 128, 8, 4, 7),
        (16, None, None, 16, 256, 4, 4, 7),
        (64, 16, None, 32, 64, 2, 8, 5),
        (64, None, None, 64, 32, 2, 8, 5),
    ],
}

EXPAND: dict[str, list[tuple[int, int | None, int | None, int, int, int, int]]] = {
    "default": [
        (16, 16, None, 64, 16, 4, 1),
        (16, None, None, 32, 32, 4, 1),
        (64, 16, None, 128, 16, 8, 1),
        (64, None, None, 128, 32, 8, 1),
    ],
}
