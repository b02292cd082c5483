"""Slots that adapters would need if local ranks were padded to multiples of 8, against what they need. Needs no GPU.

    python benchmark/kernels/padding.py [--models 8B 70B] [--tp 8]

An adapter is on all seven modules of a layer. Local ranks are those of the kernels' benchmark (``shapes.py``): plain
adapters, and block-diagonal ones with a block for each TP rank and as many parameters.
"""

from __future__ import annotations

import argparse

import shapes
from sglang_blocklora.sharding.layout import place


def slots(model: shapes.Model, tp: int, rank: int) -> int:
    """Arena rows of an adapter whose slices all have local rank ``rank``."""
    sizes = []
    for linear in shapes.linears(model, tp):
        sizes.append(len(linear.outputs) * rank * linear.in_features)
        sizes += [rank * length for length in linear.outputs]
    return place(sizes, shapes.row_width(model, tp)).rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=list(shapes.MODELS))
    parser.add_argument("--tp", nargs="+", type=int, default=[8])
    arguments = parser.parse_args()
    print("| model | TP | adapter | rank | local rank | slots | slots if padded |\n|---|---|---|---|---|---|---|")
    for name in arguments.models:
        for tp in arguments.tp:
            for adapter in shapes.adapters(shapes.MODELS[name], tp):
                own = slots(shapes.MODELS[name], tp, adapter.local_rank)
                padded = slots(shapes.MODELS[name], tp, -(-adapter.local_rank // 8) * 8)
                more = f"{padded} (+{100 * (padded / own - 1):.0f} %)"
                print(f"| {name} | {tp} | {adapter.kind} | {adapter.rank} | {adapter.local_rank} | {own} | {more} |")


if __name__ == "__main__":
    main()
