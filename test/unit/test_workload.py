"""The benchmarks' workload generator: exact popularity laws, spread of arrivals, prompts, determinism."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmark.serving.workload import Workload, popularity

MANY = 20_000
SHORT = {"user_tokens": (1, 2), "new_tokens": (1, 2)}


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_slora_popularity_is_the_law_of_the_formula(alpha):
    """Against the published formula, floor(n * power(alpha)), drawn by numpy itself."""
    n, draws = 20, 200_000
    indices = np.floor(n * np.random.default_rng(0).power(alpha, draws)).astype(int)
    found = np.bincount(indices, minlength=n) / draws
    expected = popularity(f"slora:{alpha}", n)
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected / draws))


@pytest.mark.parametrize(
    ("law", "adapters", "shares"),
    [
        ("slora:0.1", 200, {0: 200**-0.1}),  # the paper's top adapter: 59 %
        ("slora:1.0", 4, dict.fromkeys(range(4), 0.25)),
        ("zipf:1.0", 3, {0: 6 / 11, 1: 3 / 11, 2: 2 / 11}),
        ("zipf:0", 5, dict.fromkeys(range(5), 0.2)),
        ("hot:0.9", 21, {0: 0.9, 20: 0.005}),
    ],
)
def test_popularity(law, adapters, shares):
    found = popularity(law, adapters)
    assert found.shape == (adapters,)
    assert found.sum() == pytest.approx(1)
    assert {i: found[i] for i in shares} == pytest.approx(shares)


@pytest.mark.parametrize("law", ["zipf", "zipf:-1", "slora:0", "hot:1", "normal:1", "zipf:nan"])
def test_an_unknown_law_is_refused(law):
    with pytest.raises(ValueError, match=r"use slora:ALPHA > 0, zipf:S >= 0 or hot:SHARE"):
        popularity(law, 8)


def test_adapters_are_drawn_by_popularity():
    drawn = [s.adapter for s in Workload(MANY, 1.0, 8, "zipf:1.0", **SHORT).generate()]
    expected = popularity("zipf:1.0", 8)
    assert np.all(np.abs(np.bincount(drawn, minlength=8) / MANY - expected) < 5 * np.sqrt(expected / MANY))


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_arrivals_have_their_rate_and_variation(cv):
    arrivals = np.array([s.arrival_s for s in Workload(MANY, 5.0, 2, cv=cv, **SHORT).generate()])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 5, rel=5 * cv / math.sqrt(MANY))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_an_infinite_rate_sends_all_at_once():
    assert {s.arrival_s for s in Workload(50, math.inf, 2, **SHORT).generate()} == {0.0}


def test_sessions_share_the_system_prompt_and_keep_to_their_ranges():
    workload = Workload(
        300, 1.0, 4, turns=(1, 5), user_tokens=(3, 9), new_tokens=(2, 6), system_tokens=32, think_s=2.0, vocab=50
    )
    sessions = workload.generate()
    turns = [t for s in sessions for t in s.turns]
    later = [t for s in sessions for t in s.turns[1:]]
    assert {len(s.turns) for s in sessions} == {1, 2, 3, 4}
    assert len({tuple(s.turns[0].tokens[:32]) for s in sessions}) == 1
    assert {len(s.turns[0].tokens) - 32 for s in sessions} == {len(t.tokens) for t in later} == set(range(3, 9))
    assert {t.new_tokens for t in turns} == set(range(2, 6))
    assert all(t.tokens.min() >= 0 and t.tokens.max() < 50 for t in turns)
    assert all(s.turns[0].think_s == 0 for s in sessions)
    assert np.mean([t.think_s for t in later]) == pytest.approx(2.0, rel=5 / math.sqrt(len(later)))


def contents(workload: Workload) -> list[tuple]:
    return [
        (s.arrival_s, s.adapter, tuple((t.tokens.tobytes(), t.new_tokens, t.think_s) for t in s.turns))
        for s in workload.generate()
    ]


def test_equal_fields_are_equal_workloads_and_popularity_changes_nothing_else():
    one = Workload(40, 3.0, 8, turns=(1, 4), think_s=1.0, seed=3)
    assert contents(one) == contents(dataclasses.replace(one))
    assert contents(one) != contents(dataclasses.replace(one, seed=4))
    other = contents(dataclasses.replace(one, popularity="hot:0.9"))
    assert [(a, t) for a, _, t in other] == [(a, t) for a, _, t in contents(one)]
    assert [a for _, a, _ in other] != [a for _, a, _ in contents(one)]
