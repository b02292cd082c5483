"""Which replica a request goes to. Nothing here imports SGLang."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from sglang_blocklora.scheduling.replicas import ALWAYS_ROOM, BALANCE, choose_replica, preference

ADAPTERS = st.text(max_size=20)
REPLICAS = st.integers(1, 12)


def numbered(loads: Sequence[int]) -> dict[int, int]:
    return dict(enumerate(loads))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=200), st.integers(1, 5))
def test_no_replica_gets_more_than_its_share_whatever_comes_and_goes(
    steps: list[tuple[int, int]], replicas: int
) -> None:
    """Adapter 0 is far too popular; now and then the oldest request ends."""
    loads, running = dict.fromkeys(range(replicas), 0), []
    for adapter, die in steps:
        if die == 0 and running:
            loads[running.pop(0)] -= 1
            continue
        replica = choose_replica(None if adapter == 5 else f"a{max(0, adapter - 3)}", loads)
        loads[replica] += 1
        running.append(replica)
        assert loads[replica] <= max(ALWAYS_ROOM, math.ceil(BALANCE * sum(loads.values()) / replicas))


@given(ADAPTERS, st.lists(st.integers(0, ALWAYS_ROOM - 1), min_size=1, max_size=12))
def test_an_adapter_stays_on_its_replica_while_that_has_room(adapter: str, loads: list[int]) -> None:
    assert choose_replica(adapter, numbered(loads)) == preference(adapter, tuple(range(len(loads))))[0]


@given(ADAPTERS, st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_it_is_the_first_with_room_in_the_adapters_own_order(adapter: str, loads: list[int]) -> None:
    room = [load < max(ALWAYS_ROOM, math.ceil(BALANCE * (sum(loads) + 1) / len(loads))) for load in loads]
    expected = next(replica for replica in preference(adapter, tuple(range(len(loads)))) if room[replica])
    assert choose_replica(adapter, numbered(loads)) == expected
    assert choose_replica(adapter, numbered(loads)) == choose_replica(adapter, numbered(loads))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_the_base_model_goes_to_the_least_loaded(loads: list[int]) -> None:
    assert loads[choose_replica(None, numbered(loads))] == min(loads)


@given(ADAPTERS, REPLICAS)
def test_one_more_replica_moves_nothing_but_what_it_takes(adapter: str, replicas: int) -> None:
    names = tuple(range(replicas))
    before, after = preference(adapter, names), preference(adapter, (*names, replicas))
    assert sorted(before) == list(names)
    assert tuple(replica for replica in after if replica != replicas) == before


@given(ADAPTERS, st.lists(st.text(max_size=5), min_size=2, max_size=12, unique=True), st.randoms(use_true_random=False))
def test_a_replica_that_goes_moves_only_what_it_had_wherever_it_stood(
    adapter: str, names: list[str], random: Random
) -> None:
    """Names are URLs in a fleet; the order in which they are given counts for nothing."""
    first, *rest = preference(adapter, tuple(names))
    gone = random.choice(names)
    left = [name for name in names if name != gone]
    random.shuffle(left)
    assert preference(adapter, tuple(left))[0] == (rest[0] if gone == first else first)


def test_adapters_are_spread_evenly_and_overflow_is_too() -> None:
    """4,000 adapters on 8 replicas: each first (and each second) choice gets 500, within 5 standard deviations."""
    for place in (0, 1):
        counts = Counter(preference(f"adapter-{i}", tuple(range(8)))[place] for i in range(4000))
        assert all(abs(counts[replica] - 500) < 5 * math.sqrt(4000 / 8 * 7 / 8) for replica in range(8))


def test_the_order_is_the_same_in_every_process() -> None:
    """By hand: sha256 of "0\\0sql" starts with its digest's first bytes, and so on; the smallest comes first."""
    import hashlib

    digests = {i: hashlib.sha256(b"%d\0sql" % i).hexdigest() for i in range(4)}
    assert preference("sql", (0, 1, 2, 3)) == tuple(sorted(digests, key=digests.__getitem__))
