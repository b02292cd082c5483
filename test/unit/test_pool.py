"""The pool under random operations: no slot leaks, nothing resident is unloaded, ranks decide alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.pool import AdapterPool, LoadedAdapter
from sglang_blocklora.memory.static_arena import StaticArena

SLOTS = 24


def adapter(number: int, slots: int, pinned: bool = False) -> LoadedAdapter:
    """An adapter whose rows all hold its number."""
    image = torch.full((2, 2, slots, 4), float(number))
    shard = AdapterShard(f"a{number}", 1, 1, image, (), (), ())
    return LoadedAdapter(shard.name, "", shard, slots, pinned, "")


def new_pool() -> AdapterPool:
    return AdapterPool(StaticArena(2, SLOTS, 4, torch.float32, torch.device("cpu")), max_adapters_per_batch=4)


class PoolMachine(RuleBasedStateMachine):
    """Two pools (two TP ranks) get the same calls, their keys in different orders."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = [new_pool(), new_pool()]
        self.count = 0

    @rule(slots=st.integers(1, SLOTS + 4), pinned=st.booleans())
    def load(self, slots: int, pinned: bool) -> None:
        if self.ranks[0].reason_not_to_add(slots, pinned) is not None:
            return
        for pool in self.ranks:
            pool.add(f"key{self.count}", adapter(self.count, slots, pinned))
        self.count += 1

    @precondition(lambda self: self.ranks[0].loaded)
    @rule(data=st.data())
    def unload(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.ranks[0].loaded)))
        for pool in self.ranks:
            pool.remove(key)

    @precondition(lambda self: self.ranks[0].loaded)
    @rule(data=st.data())
    def run(self, data) -> None:
        keys = data.draw(st.lists(st.sampled_from([*sorted(self.ranks[0].loaded), "unknown"]), unique=True))
        if not self.ranks[0].fits(keys):
            assert not self.ranks[1].fits(reversed(keys))
            return
        self.ranks[0].make_resident(keys)
        self.ranks[1].make_resident(reversed(keys))
        for pool in self.ranks:
            for key in set(keys) - {"unknown"}:
                rows = pool.arena._rows[:, :, pool.resident[key].slots]
                assert (rows == float(key.removeprefix("key"))).all(), "rows of another adapter"

    @invariant()
    def sound(self) -> None:
        for pool in self.ranks:
            pool.check_integrity()
        first, second = ([(k, r.slots.tolist()) for k, r in pool.resident.items()] for pool in self.ranks)
        assert first == second


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_every_adapter_that_is_accepted_can_run_alone_beside_the_pinned_ones() -> None:
    pool = new_pool()
    pool.add("p", adapter(0, SLOTS // 2, pinned=True))
    pool.make_resident(["p"])
    assert pool.reason_not_to_add(1, pinned=True) is not None
    assert pool.reason_not_to_add(SLOTS // 2 + 1, pinned=False) is not None
    assert pool.reason_not_to_add(SLOTS // 2, pinned=False) is None
    for number in (1, 2):
        pool.add(f"k{number}", adapter(number, SLOTS // 2))
        assert pool.fits([f"k{number}"])
        pool.make_resident([f"k{number}"])
        assert set(pool.resident) == {"p", f"k{number}"}, "the pinned adapter stays, the other makes room"


def test_batch_limit_counts_adapters_not_the_base_model() -> None:
    pool = new_pool()
    for number in range(5):
        pool.add(str(number), adapter(number, 1))
    assert pool.fits(["0", "1", "2", "3"])
    assert not pool.fits(["0", "1", "2", "3", "4"])


def test_arena_prefers_a_run_and_falls_back_to_scattered_slots() -> None:
    arena = StaticArena(1, 10, 4, torch.float32, torch.device("cpu"))
    first, second, third = (arena.allocate(n) for n in (3, 2, 3))
    assert first is not None
    assert second is not None
    assert third is not None
    arena.free(first)
    assert arena.allocate(2).tolist() == [0, 1]
    scattered = arena.allocate(3)
    assert scattered.tolist() == [2, 8, 9]
    assert arena.allocate(1) is None
    assert (np.diff(third) == 1).all()


def test_freeing_twice_is_an_error() -> None:
    arena = StaticArena(1, 4, 4, torch.float32, torch.device("cpu"))
    slots = arena.allocate(2)
    arena.free(slots)
    with pytest.raises(ValueError, match="twice"):
        arena.free(slots)
