"""Two runs of a benchmark, compared: which pairs of variants have one order in both."""

from __future__ import annotations

from dataclasses import replace

from benchmark.record import Run
from benchmark.sections import Column, Section
from benchmark.stability import Ranking, compare

SECTION = Section(part="any", baseline="a", columns=(Column(header="step, ms", figure="step"),))


def run(**steps: list[float]) -> Run:
    return Run({}, {"Batch 1": {name: {"step": values} for name, values in steps.items()}})


def test_pairs_are_of_one_order_contrary_or_not_apart():
    before = run(a=[1.0, 2.0], b=[3.0, 4.0], c=[5.0, 6.0], only_before=[9.0])
    after = run(a=[1.0, 2.0], b=[5.0, 6.0], c=[3.0, 5.5], only_after=[9.0])
    # a before b and a before c in both; b and c overlap in the second run.
    assert list(compare(SECTION, before, after)) == [Ranking("Batch 1", "step", 2, [], 1)]


def test_a_pair_that_changes_places_is_named():
    before, after = run(a=[1.0, 2.0], b=[3.0, 4.0]), run(a=[3.0, 4.0], b=[1.0, 2.0])
    assert list(compare(SECTION, before, after)) == [Ranking("Batch 1", "step", 0, [("a", "b")], 0)]


def test_what_is_computed_from_a_run_is_compared_too():
    section = replace(SECTION, derived=lambda measured: {"Doubled": measured["Batch 1"]})
    both = [Ranking(scenario, "step", 1, [], 0) for scenario in ("Doubled", "Batch 1")]
    assert list(compare(section, run(a=[1.0], b=[2.0]), run(a=[3.0], b=[4.0]))) == both


def test_ranges_that_touch_are_not_apart():
    before, after = run(a=[1.0, 2.0], b=[2.0, 3.0]), run(a=[1.0, 1.5], b=[2.0, 3.0])
    assert list(compare(SECTION, before, after)) == [Ranking("Batch 1", "step", 0, [], 1)]


def test_what_only_one_run_has_is_left_out():
    assert list(compare(SECTION, Run({}, {"Batch 8": {}}), run(a=[1.0], b=[2.0]))) == []
