"""What the soak takes for right: its own judgement, on a clock and a world of a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.soak import ledger as ledger_module
from blocklora_testing.soak.client import Answer
from blocklora_testing.soak.ledger import GRACE_S
from blocklora_testing.soak.run import Asked, Run
from blocklora_testing.soak.watch import Growth, Sample
from blocklora_testing.soak.world import NEW_TOKENS, World

WORLD = World(
    model=Path(),
    contents={"old": Path("old"), "new": Path("new")},
    prompts=[[1]],
    expected={None: [[1, 1, 1]], "old": [[2, 2, 2]], "new": [[3, 3]]},  # the third token of "new" is a near tie
    decode=lambda tokens: "".join(map(str, tokens)),
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def run(clock: list[float]) -> Run:
    """``a`` held the old contents until 10 and holds the new ones since 12; in between it was unloaded and loaded."""
    run = Run(world=WORLD, place=Any, client=Any, seed=0, popular=["a"], pool_tokens=1)  # type: ignore[arg-type]
    run.ledger.there("a", "old")
    old = run.ledger.newest("a")
    old.leaving, old.until = 9.0, 10.0
    clock[0] = 11.0
    run.ledger.coming("a", "new").ready = 12.0
    return run


def problems(run: Run, name: str | None, found: list[int], begin: float, end: float, **how: Any) -> list[str]:
    answer = Answer(status=200, body=None, begin=begin, end=end)
    run.judge("kind", Asked(name=name, prompt=0, tokens=3), answer, found, how.pop("ended", "length"), **how)
    return run.tally.problems


def test_the_contents_of_that_time_are_right(run: Run) -> None:
    assert problems(run, "a", [2, 2, 2], 1, 2) == []
    assert problems(run, "a", [2, 2, 2], 9.5, 13) == []
    assert problems(run, "a", [3, 3, 9], 9.5, 13) == [], "the last token is not certain"
    assert problems(run, None, [1, 1, 1], 1, 2) == []
    assert run.tally.rows["kind"].right == 4


@pytest.mark.parametrize(
    ("name", "found", "begin", "end"),
    [
        ("a", [2, 2, 2], 10.5, 13),  # unloaded before it was sent
        ("a", [3, 3, 3], 1, 2),  # not loaded yet
        ("a", [1, 1, 1], 1, 2),  # the base model's
        (None, [2, 2, 2], 1, 2),  # an adapter's
        ("a", [2, 2], 1, 2),  # too few
        ("a", [], 1, 2),
        ("b", [2, 2, 2], 1, 2),  # no such name
    ],
)
def test_other_tokens_are_wrong(run: Run, name: str | None, found: list[int], begin: float, end: float) -> None:
    assert problems(run, name, found, begin, end)


def test_an_aborted_answer_is_short_and_asked_for(run: Run) -> None:
    assert problems(run, "a", [2], 1, 2, ended="abort", aborted=True) == []
    assert run.tally.rows["kind"].aborted == 1
    assert problems(run, "a", [1], 1, 2, ended="abort", aborted=True), "wrong tokens are wrong all the same"


def test_an_abort_that_nobody_asked_for_is_wrong(run: Run, clock: list[float]) -> None:
    clock[0] = 20.0
    with run.ledger.storm():
        clock[0] = 21.0
    assert problems(run, "a", [3], 20.5, 22, ended="abort") == []
    assert problems(run, "a", [3], 22, 23, ended="abort")


def refusal(run: Run, status: int, begin: float, end: float) -> list[str]:
    answer = Answer(status=status, body="no", begin=begin, end=end)
    run.judge_refusal("kind", [Asked(name="a", prompt=0, tokens=3)], answer)
    return run.tally.problems


def test_a_refusal_is_right_only_while_a_name_changes_or_its_folder_is_harmed(run: Run, clock: list[float]) -> None:
    assert refusal(run, 404, 9.5, 9.6) == []
    clock[0] = 20.0
    with run.ledger.harm("a"):
        clock[0] = 21.0
    assert refusal(run, 400, 20.5, 20.6) == []
    assert refusal(run, 400, 21 + GRACE_S + 0.1, 30)
    run.tally.rows.clear()
    assert refusal(run, 400, 1, 2)
    run.tally.rows.clear()
    assert refusal(run, 500, 9.5, 9.6), "an internal error is never right"


@pytest.mark.parametrize(
    ("last", "level"), [((104, 30, 10), True), ((140, 30, 10), False), ((100, 90, 10), False), ((100, 30, 30), False)]
)
def test_growth(last: tuple[float, int, int], level: bool) -> None:
    first = Sample(seconds=0, rss_mib=100, files=30, threads=10)
    rss_mib, files, threads = last
    growth = Growth(name="p", first=first, last=Sample(seconds=1, rss_mib=rss_mib, files=files, threads=threads))
    assert growth.level == level


@pytest.mark.parametrize(("text", "count"), [("33", 2), ("3344", NEW_TOKENS), ("3", 1), ("34", None)])
def test_a_text_is_as_many_tokens_as_are_certain_and_whole_where_it_goes_on(text: str, count: int | None) -> None:
    """One content has a single certain token: its answers of four were counted as two, which nobody had aborted."""
    tokens = WORLD.tokens_of("new", 0, text)
    assert (None if tokens is None else len(tokens)) == count
