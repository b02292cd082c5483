"""Chooses the tiles of a launch from ``tile_table.py``, by architecture, rank, widths and tokens alone."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from blocklora_kernels import tile_table


class Tiling(NamedTuple):
    """Sizes that all launches of a batch share: tokens of a tile, and parts that shrink cuts its columns into."""

    block_tokens: int
    splits: int


class ShrinkTile(NamedTuple):
    """Sizes of one shrink launch.

    ``block_n`` rows of A by ``block_k`` columns at a time; ``lanes`` programs share the chunks of h of one tile.
    """

    block_n: int
    block_k: int
    lanes: int
    warps: int
    stages: int


class ExpandTile(NamedTuple):
    """Sizes of one expand launch: ``block_o`` output columns by ``block_r`` ranks at a time."""

    block_o: int
    block_r: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """Key of the tile table: "sm_90" for compute capability 9.0, "default" without a GPU."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _holds(limit: int | None, value: int) -> bool:
    return limit is None or value <= limit


@cache
def tiling(arch: str, tokens: int) -> Tiling:
    """Sizes for a batch of ``tokens`` tokens; the same for every batch that replays one CUDA graph."""
    for limit, *values in tile_table.TILINGS.get(arch, tile_table.TILINGS["default"]):
        if _holds(limit, tokens):
            return Tiling(*values)
    raise ValueError(f"tile table: TILINGS of {arch} has no entry for {tokens} tokens")


@cache
def shrink_tile(arch: str, block_tokens: int, rank: int, in_features: int) -> ShrinkTile:
    """Sizes for shrink. ``rank`` is the usual local rank of one slice: it decides speed, any is served right."""
    for block, max_rank, max_width, *values in tile_table.SHRINK.get(arch, tile_table.SHRINK["default"]):
        if block == block_tokens and _holds(max_rank, rank) and _holds(max_width, in_features):
            return ShrinkTile(*values)
    raise ValueError(f"tile table: SHRINK of {arch} has no entry for {block_tokens} tokens, rank {rank}")


@cache
def expand_tile(arch: str, block_tokens: int, rank: int, out_features: int) -> ExpandTile:
    """Sizes for expand, as ``shrink_tile``; ``out_features`` is the width of all slices together."""
    for block, max_rank, max_width, *values in tile_table.EXPAND.get(arch, tile_table.EXPAND["default"]):
        if block == block_tokens and _holds(max_rank, rank) and _holds(max_width, out_features):
            return ExpandTile(*values)
    raise ValueError(f"tile table: EXPAND of {arch} has no entry for {block_tokens} tokens, rank {rank}")


def scratch_rows(arch: str, max_tokens: int) -> int:
    """Largest splits * tokens of any batch up to ``max_tokens``: rows of h that the scratch buffer must hold."""
    limits = [limit for limit, *_ in tile_table.TILINGS.get(arch, tile_table.TILINGS["default"]) if limit is not None]
    sizes = [min(limit, max_tokens) for limit in limits] + [max_tokens]
    return max(tiling(arch, tokens).splits * tokens for tokens in sizes if tokens > 0)
