"""Chooses the tiles of a launch from ``tile_table.py``, by architecture, rank, widths and tokens alone."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from blocklora_kernels import tile_table

# Without a GPU, where the interpreter runs programs one after another.
PROCESSORS_OF_INTERPRETER = 4


class Tiling(NamedTuple):
    """Sizes that all launches of a batch share: tokens of a tile, and the most parts that columns are cut into."""

    block_tokens: int
    most_splits: int


class ShrinkTile(NamedTuple):
    """Sizes of one shrink launch.

    ``block_n`` rows of A by ``block_k`` columns at a time; ``programs`` for each multiprocessor.
    """

    block_n: int
    block_k: int
    programs: int
    warps: int
    stages: int


class ExpandTile(NamedTuple):
    """Sizes of one expand launch: ``block_o`` output columns by ``block_r`` ranks at a time."""

    block_o: int
    block_r: int
    programs: int
    warps: int
    stages: int


def architecture(device: torch.device) -> str:
    """Key of the tile table: "sm_90" for compute capability 9.0, "default" without a GPU."""
    if device.type != "cuda":
        return "default"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    if device.type != "cuda":
        return PROCESSORS_OF_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


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


@cache
def rank_class(arch: str, rank: int) -> int:
    """The smallest limit of the table that ``rank`` is within, or one more than the largest.

    All ranks of a class share tiles. Kernels are compiled for each class, not for each rank.
    """
    return next((limit for limit in rank_classes(arch) if rank <= limit), rank_classes(arch)[-1])


@cache
def rank_classes(arch: str) -> tuple[int, ...]:
    """A rank of each class, ascending."""
    tables = (tile_table.SHRINK, tile_table.EXPAND)
    limits = {entry[1] for table in tables for entry in table.get(arch, table["default"])}
    known = sorted(limit for limit in limits if limit is not None)
    return (*known, (known[-1] if known else 0) + 1)


@cache
def token_classes(arch: str, max_tokens: int) -> tuple[int, ...]:
    """The most tokens of each tiling that batches of up to ``max_tokens`` use, ascending."""
    entries = tile_table.TILINGS.get(arch, tile_table.TILINGS["default"])
    return tuple(sorted({min(limit or max_tokens, max_tokens) for limit, *_ in entries}))


def scratch_rows(arch: str, max_tokens: int, processors: int) -> int:
    """Most splits * adapted tokens of any batch up to ``max_tokens``: rows of h that the scratch buffer must hold.

    A batch is cut no further than into the pieces that fill the GPU (``division.py``), each of one tile's tokens.
    """
    most = 0
    for tokens in token_classes(arch, max_tokens):
        block, splits = tiling(arch, tokens)
        entries = tile_table.SHRINK.get(arch, tile_table.SHRINK["default"])
        pieces = processors * max(programs for tile, *_, programs, _, _ in entries if tile == block)
        most = max(most, tokens, min(splits * tokens, block * pieces))
    return most
