"""Do two runs of a part rank its variants alike? The newest two finished runs, every figure that a report shows.

Two variants are apart in a run where the ranges of their rounds do not overlap. A pair that is apart in both runs has
one order in both, or is named as contrary; a pair that overlaps in one of them is not told apart by these runs.

    python -m benchmark.stability [PART ...]      # without parts: all that were measured twice
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmark.record import Run, finished
from benchmark.sections import SECTIONS, Section, Variants


class Ranking(NamedTuple):
    """Pairs of variants by one figure of one scenario: of one order in both runs, contrary, and not told apart."""

    scenario: str
    figure: str
    same: int
    contrary: list[tuple[str, str]]
    unclear: int


def order(one: Sequence[float], other: Sequence[float]) -> int:
    """-1 where all of ``one`` are smaller, 1 where all are larger, 0 where the ranges overlap or touch."""
    return -1 if max(one) < min(other) else int(min(one) > max(other))


def rank(scenario: str, figure: str, before: Variants, after: Variants) -> Ranking:
    """Compare all pairs of the variants that both runs have with this figure."""
    names = [name for name in after if figure in after[name] and figure in before.get(name, {})]
    same, contrary, unclear = 0, [], 0
    for pair in itertools.combinations(names, 2):
        then, now = (order(*(run[name][figure] for name in pair)) for run in (before, after))
        if then * now < 0:
            contrary.append(pair)
        same += then * now > 0
        unclear += then * now == 0
    return Ranking(scenario, figure, same, contrary, unclear)


def compare(section: Section, before: Run, after: Run) -> Iterator[Ranking]:
    """Every scenario that both runs have, by every figure that is shown."""
    earlier = section.shown(before.figures)
    for scenario, variants in section.shown(after.figures).items():
        then = earlier.get(scenario, {})
        for column in section.columns:
            ranking = rank(scenario, column.figure, then, variants)
            if ranking.same or ranking.contrary or ranking.unclear:
                yield ranking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parts = parser.parse_args().parts
    for section in SECTIONS:
        runs = finished(section.part)[-2:]
        if len(runs) < 2 or (parts and section.part not in parts):
            continue
        print(f"\n{section.part}: {' and '.join(run.conditions['commit'] for run in runs)}")
        print(f"{'scenario':32} {'figure':28} {'same order':>10} {'contrary':>8} {'not apart':>9}")
        for found in compare(section, *runs):
            print(f"{found.scenario:32} {found.figure:28} {found.same:10} {len(found.contrary):8} {found.unclear:9}")
            for one, other in found.contrary:
                print(f"    contrary: {one}, {other}")


if __name__ == "__main__":
    main()
