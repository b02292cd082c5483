"""Times the candidate tiles on this GPU and writes its entries into blocklora_kernels/tile_table.py. Needs a GPU.

    python benchmark/kernels/tune.py [--models 8B] [--tp 1 8]

TILINGS stay: they fix how metadata are built. Shrink and expand are tuned each on its own: for each class of
shapes the tile with the least sum of times relative to the best of each problem wins.
"""

from __future__ import annotations

import argparse
import itertools
import pprint
from collections import defaultdict
from pathlib import Path

import numpy as np
import shapes
import torch
import triton
from blocklora_kernels import tile_table, tiles
from problem import Problem, build
from timing import capture, replay_times_us

RANK_LIMITS = (16, None)  # each is a class, for which all kernels are compiled at a server's start
WIDTH_LIMITS = (1024, 8192, None)
BATCHES = {16: [(1, 1), (16, 16), (64, 8)], 64: [(2048, 8)]}
SHRINK = {
    16: list(itertools.product((16,), (64, 128, 256), (1, 2, 4), (2, 4, 8), (5, 7))),
    64: list(itertools.product((16, 32, 64), (32, 64, 128), (1, 2), (4, 8), (3, 5))),
}
EXPAND = {
    16: list(itertools.product((64, 128, 256), (16, 32, 64), (1, 2, 4), (4, 8), (1,))),
    64: list(itertools.product((64, 128), (16, 32), (1, 2), (4, 8), (1, 3))),
}
Key = tuple[int, int | None, int | None]


def limit(limits: tuple[int | None, ...], value: int) -> int | None:
    return next(bound for bound in limits if bound is None or value <= bound)


def use(op: str, candidate: tuple[int, ...]) -> None:
    """Serve ``candidate`` as the only tile of ``op`` for both block sizes."""
    setattr(tile_table, op, {"default": [(block, None, None, *candidate) for block in (16, 64)]})
    for function in vars(tiles).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def time_us(p: Problem, op: str, candidate: tuple[int, ...]) -> float:
    """Median time of one call, infinite where the tile does not fit the GPU."""
    use(op, candidate)

    def run(copy: int) -> None:
        if op == "SHRINK":
            p.ours[copy].shrink(p.x, p.batch)
        else:
            p.ours[copy].expand_(p.out, p.batch)

    try:
        return float(np.median(replay_times_us(capture(run, len(p.ours)), len(p.ours))))
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def tune(models: list[str], sizes: list[int]) -> dict[str, dict[Key, tuple[int, ...]]]:
    """Best tile of each class: block of tokens, limit of the rank, limit of the width."""
    scores: dict[tuple[str, Key], dict[tuple[int, ...], float]] = defaultdict(lambda: defaultdict(float))
    for name, tp in itertools.product(models, sizes):
        model = shapes.MODELS[name]
        for adapter, linear in itertools.product(shapes.adapters(model, tp), shapes.linears(model, tp)):
            for block, (tokens, count) in [(b, pair) for b, pairs in BATCHES.items() for pair in pairs]:
                per_token = np.arange(tokens) * count // tokens
                use("SHRINK", max(SHRINK[block], key=lambda candidate: candidate[2]))  # h must hold the most splits
                p = build(linear, adapter.local_rank, shapes.row_width(model, tp), per_token, count, False)
                for op, table, width in (
                    ("SHRINK", SHRINK, linear.in_features),
                    ("EXPAND", EXPAND, sum(linear.outputs)),
                ):
                    key = (op, (block, limit(RANK_LIMITS, adapter.local_rank), limit(WIDTH_LIMITS, width)))
                    times = {candidate: time_us(p, op, candidate) for candidate in table[block]}
                    best = min(times.values())
                    for candidate, value in times.items():
                        scores[key][candidate] += value / best
                    print(key, linear.name, f"tp {tp}", f"best {best:.1f} us", min(times, key=times.__getitem__))
    found: dict[str, dict[Key, tuple[int, ...]]] = {"SHRINK": {}, "EXPAND": {}}
    for (op, key), by_tile in scores.items():
        found[op][key] = min(by_tile, key=by_tile.__getitem__)
    return found


def entries(best: dict[Key, tuple[int, ...]], default: list[tuple[int | None, ...]]) -> list[tuple[int | None, ...]]:
    """Table entries, narrow limits first, ended by the default's so that every shape finds one."""

    def order(key: Key) -> tuple[float, ...]:
        return tuple(float("inf") if value is None else value for value in key)

    return [(*key, *best[key]) for key in sorted(best, key=order)] + default


def write(path: Path, original: dict[str, dict[str, list[tuple[int | None, ...]]]]) -> None:
    """Replace the data of the table, keeping its text."""
    text = path.read_text()
    for name, table in original.items():
        head, rest = text.split(f"\n{name}: ", 1)
        annotation, rest = rest.split(" = ", 1)
        tail = rest[rest.index("\n}\n") + 3 :]
        body = pprint.pformat(table, width=118)
        text = f"{head}\n{name}: {annotation} = {{\n {body[1:-1]},\n}}\n{tail}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["8B"], choices=list(shapes.MODELS))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 8])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune.py needs a GPU.")
    arch = tiles.architecture(torch.device("cuda"))
    original = {name: dict(getattr(tile_table, name)) for name in ("TILINGS", "SHRINK", "EXPAND")}
    for table in original.values():
        table.pop(arch, None)
    tile_table.TILINGS = {"default": original["TILINGS"]["default"]}
    best = tune(arguments.models, arguments.tp)
    for op, found in best.items():
        original[op][arch] = entries(found, original[op]["default"])
    assert tile_table.__file__ is not None
    write(Path(tile_table.__file__), original)
    print(f"wrote {tile_table.__file__}; run ruff format and the tests")


if __name__ == "__main__":
    main()
