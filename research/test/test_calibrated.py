"""The calibrated cost model: it finds constants that it was made with, and its recorded figures are made again."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmark.record import REPOSITORY
from research import calibrated
from research.calibrated import Fitted, fit, points


def test_the_constants_that_made_the_points_are_found() -> None:
    truth = Fitted(2e-3, 40e-6, 3e-10)
    made = [dataclasses.replace(point, reported=point.speed_up(truth)) for point in points()]
    for half in (made[:2], made[2:], made[1:3]):
        found = fit(half, truth.host_s)
        assert found.collective_s == pytest.approx(truth.collective_s)
        assert found.per_byte_s == pytest.approx(truth.per_byte_s)
    assert [point.error(truth) for point in made] == pytest.approx([0] * 4)


def test_points_that_ask_for_less_than_nothing_are_fitted_with_nothing() -> None:
    """At one multiple of the rank, where a larger lead of the larger model would need bytes that save time."""
    found = fit([points()[0], points()[2]], calibrated.HOST_S)
    assert found.per_byte_s == 0
    assert found.collective_s > 0


def test_the_recorded_split_and_figures_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Kept:
        def __init__(self, *_: object) -> None: ...
        def add(self, *row: object) -> None:
            made.append(row)

        def finish(self) -> None: ...

    monkeypatch.setattr(calibrated, "Recorder", Kept)
    calibrated.main()
    path = REPOSITORY / "research/results" / f"{calibrated.PART}.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "figures" in row]
    newest = [row for row in rows if row["run"] == rows[-1]["run"]]
    assert [(row["scenario"], row["variant"]) for row in newest] == [row[:2] for row in made]
    for row, (_, _, _, figures) in zip(newest, made, strict=True):
        assert row["figures"] == pytest.approx(figures, abs=1e-9)
