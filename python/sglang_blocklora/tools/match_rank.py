"""Finds the rank at which a block-diagonal adapter has no more parameters than a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_blocklora.sharding.architectures import kind_of, suffix_of


@dataclass(frozen=True, kw_only=True)
class MatchedRank:
    """The rank found, for modules of these names; ``block_rank`` is that of one block, ``rank / nblocks``."""

    rank: int
    nblocks: int
    block_rank: int
    parameters: int
    budget: int
    modules: tuple[str, ...]


def plain_parameters(modules: Sequence[tuple[str, int, int]], rank: int) -> int:
    """Parameters of a plain adapter of ``rank`` on ``modules`` (module, in, out)."""
    return rank * sum(inputs + outputs for _, inputs, outputs in modules)


def match_rank(modules: Sequence[tuple[str, int, int]], nblocks: int, budget: int) -> MatchedRank:
    """The largest rank, a multiple of ``nblocks``, with at most ``budget`` parameters.

    modules  (module name, in, out) of every adapted linear of every layer
    A rank costs in + out/n on column-parallel linears (B in blocks) and in/n + out on row-parallel ones (A in blocks).
    ``ValueError`` where the blocks do not divide an axis, or not even one rank a block fits the budget.
    """
    per_rank = 0
    for module, inputs, outputs in modules:
        split, whole = (inputs, outputs) if kind_of(module) == "row" else (outputs, inputs)
        if split % nblocks:
            axis = "in" if kind_of(module) == "row" else "out"
            raise ValueError(
                f"{module}: {axis}_features {split} is no multiple of nblocks {nblocks}; choose another n."
            )
        per_rank += whole + split // nblocks
    rank = budget // per_rank // nblocks * nblocks
    if rank == 0:
        raise ValueError(
            f"{budget} parameters are too few: rank {nblocks} needs {nblocks * per_rank}. Choose a smaller n."
        )
    return MatchedRank(
        rank=rank,
        nblocks=nblocks,
        block_rank=rank // nblocks,
        parameters=rank * per_rank,
        budget=budget,
        modules=tuple(dict.fromkeys(suffix_of(module) for module, _, _ in modules)),
    )
