"""Which adapters a strategy holds, and that nothing but the order of calls decides it."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import pytest
from sglang_blocklora.memory.eviction import HALVING_ARRIVALS, LRU, Arrivals, CostAware, EvictionStrategy, KVFirst

RESIDENT = {"a": 10, "b": 20, "c": 30}


def come(strategy: EvictionStrategy, arrivals: str, kv_hit: int = 0) -> None:
    """One request for each letter; "-" is the base model."""
    for letter in arrivals:
        strategy.arrived(None if letter == "-" else letter, lambda: kv_hit)


def test_lru_leaves_everything_to_the_tree() -> None:
    strategy = LRU()
    come(strategy, "aab")
    assert strategy.protected(RESIDENT, 100) == []


def test_kv_first_holds_all_and_gives_up_the_least_recently_asked_for() -> None:
    strategy = KVFirst()
    come(strategy, "acba-")
    assert strategy.protected(RESIDENT, 100) == ["c", "b", "a"]
    assert strategy.protected(RESIDENT | {"never": 1}, 100) == ["never", "c", "b", "a"]


def test_cost_aware_holds_what_is_worth_more_per_slot_than_kv() -> None:
    """Of 10 arrivals 6 are for a, 3 for b, 1 for c. Worth per slot 0.6, 0.3, 0.1 x 1 token; KV as computed below."""
    strategy = CostAware(copy_tokens_per_slot=1.0)
    come(strategy, "aaaaaabbbc", kv_hit=20)
    assert strategy.protected(RESIDENT, kv_slots=100) == ["b", "a"], "KV: 20 tokens an arrival / 100 slots = 0.2"
    assert strategy.protected(RESIDENT, kv_slots=1000) == ["c", "b", "a"], "0.02"
    assert strategy.protected(RESIDENT, kv_slots=25) == [], "0.8"


def test_a_dearer_copy_holds_more() -> None:
    held = []
    for copy_tokens_per_slot in (0.1, 1.0, 10.0):
        strategy = CostAware(copy_tokens_per_slot)
        come(strategy, "aaaaaabbbc", kv_hit=20)
        held.append(len(strategy.protected(RESIDENT, kv_slots=100)))
    assert held == [0, 2, 3]


def test_only_cost_aware_looks_up_kv() -> None:
    """A look-up walks the whole prompt."""
    for strategy in (LRU(), KVFirst()):
        strategy.arrived("a", lambda: pytest.fail("looked up"))


def test_popularity_fades_and_the_forgotten_take_no_memory() -> None:
    arrivals = Arrivals()
    arrivals.note("old")
    for _ in range(HALVING_ARRIVALS - 1):
        arrivals.note("new")
    assert arrivals.rate("new") > 500 * arrivals.rate("old") > 0
    for _ in range(20 * HALVING_ARRIVALS):
        arrivals.note(None)
    assert (arrivals.rate("old"), arrivals.last("old")) == (0, 0)
    assert not arrivals._counts
    assert not arrivals._last


def test_rates_are_exact() -> None:
    """Halved integers are exact in a float for as long as they count, so no machine rounds differently."""
    arrivals, count, total = Arrivals(), Fraction(0), Fraction(0)
    for number in range(1, 5 * HALVING_ARRIVALS):
        arrivals.note("a" if number % 3 else None)
        count, total = count + (number % 3 > 0), total + 1
        if number % HALVING_ARRIVALS == 0:
            count, total = count / 2, total / 2
    assert Fraction(arrivals._counts["a"]) == count
    assert arrivals.rate("a") == float(count) / float(total)


DECIDE = """
import random
from sglang_blocklora.memory.eviction import STRATEGIES
for name, make in STRATEGIES.items():
    source, strategy, names = random.Random(1), make(), [f"adapter {i}" for i in range(40)]
    for _ in range(3000):
        strategy.arrived(source.choice([None, *names]), lambda: source.randrange(5))
    print(name, strategy.protected({adapter: 100 for adapter in names}, 30))
    print(name, strategy.protected({adapter: 100 for adapter in names}, 3000))
"""


def test_ranks_decide_alike_whatever_their_hash_seed() -> None:
    """Same calls in two processes; their sets and hashes are ordered differently."""
    answers = [
        subprocess.run(
            [sys.executable, "-c", DECIDE],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert answers[0] == answers[1]
    assert answers[0].count("adapter") > 100
