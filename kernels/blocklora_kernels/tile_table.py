"""Tiles by architecture. Data only: ``benchmark/kernels/tune.py`` rewrites this file on a GPU, ``tiles.py`` reads it.

An architecture ("sm_90") without an entry uses "default". In each list the first entry whose limits hold is taken;
a limit of None always holds. The rank is the largest local rank of a slice among the batch's adapters, ``programs`` are
those of a launch for each multiprocessor.

TILINGS   (tokens of the batch, block_tokens, most splits)
SHRINK  (block_tokens, rank, input width, block_n, block_k, programs, warps, stages)
EXPAND  (block_tokens, rank, output width, block_o, block_r, programs, warps, stages)

"default" is reasoned, not measured (docs/kernels.md says how).
"""

TILINGS: dict[str, list[tuple[int | None, int, int]]] = {
    "default": [
        (256, 16, 32),
        (None, 64, 4),
    ],
}

SHRINK: dict[str, list[tuple[int, int | None, int | None, int, int, int, int, int]]] = {
    "default": [
        (16, None, 1024, 16, 64, 2, 2, 5),
        (16, None, None, 16, 128, 2, 4, 7),
        (64, 16, None, 32, 64, 2, 8, 5),
        (64, None, None, 64, 64, 2, 4, 5),
    ],
}

EXPAND: dict[str, list[tuple[int, int | None, int | None, int, int, int, int, int]]] = {
    "default": [
        (16, 16, None, 128, 16, 2, 8, 1),
        (16, None, None, 128, 64, 2, 8, 1),
        (64, 16, None, 128, 16, 1, 8, 1),
        (64, None, None, 128, 32, 1, 8, 1),
    ],
}
