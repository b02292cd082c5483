"""The pool under random operations: no slot leaks, nothing resident is unloaded, ranks decide alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocklora_testing.ranks import Ranks
from blocklora_testing.tiers import LAYERS, WIDTH, Disk, numbered
from blocklora_testing.toy import host_only_images
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import STRATEGIES
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool

SLOTS = 24
HOST_SLOTS = 20


def new_pool(images: ImageStore | None = None, strategy: str = "lru") -> StaticPool:
    arena = StaticArena(LAYERS, SLOTS, WIDTH, torch.float32, torch.device("cpu"))
    return StaticPool(arena, 4, images or host_only_images(), DecisionLog(None, 0), STRATEGIES[strategy]())


class PoolMachine(RuleBasedStateMachine):
    """Two TP ranks get the same calls, their keys in different orders, over disks that fail one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.broken: set[str] = set()  # adapters that a disk did not have as they were, now or before

    @initialize(strategy=st.sampled_from(sorted(STRATEGIES)))
    def start(self, strategy: str) -> None:
        self.disks = [Disk(), Disk()]
        self.ranks = Ranks(lambda rank, reads: self.make(rank, reads, strategy))
        self.pools = self.ranks.objects

    def make(self, rank: int, reads, strategy: str) -> StaticPool:
        images = ImageStore(HOST_SLOTS, 1, self.disks[rank].read, reads, DecisionLog(None, rank))
        return new_pool(images, strategy)

    @rule(slots=st.integers(1, SLOTS + 4), pinned=st.booleans())
    def load(self, slots: int, pinned: bool) -> None:
        if self.pools[0].reason_not_to_add(slots, pinned) is not None:
            return
        for pool in self.pools:
            pool.add(f"key{self.count}", *numbered(self.count, slots, pinned))
        self.count += 1

    @precondition(lambda self: self.pools[0].loaded)
    @rule(data=st.data())
    def unload(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.pools[0].loaded)))
        for pool in self.pools:
            pool.remove(key)

    @precondition(lambda self: self.count)
    @rule(data=st.data(), rank=st.integers(0, 1), state=st.sampled_from([None, "gone", "other"]))
    def change_disk(self, data, rank: int, state: str | None) -> None:
        """A folder vanishes, changes or comes back, as one TP rank sees it."""
        name = f"a{data.draw(st.integers(0, self.count - 1))}"
        self.disks[rank].states[name] = state or ""
        self.broken |= {name} if state else set()

    @precondition(lambda self: self.pools[0].loaded)
    @rule(data=st.data())
    def prefetch(self, data) -> None:
        keys = data.draw(st.lists(st.sampled_from([*sorted(self.pools[0].loaded), "unknown"]), unique=True))
        self.ranks.call(lambda pool: pool.prefetch(keys))

    @precondition(lambda self: self.pools[0].loaded)
    @rule(data=st.data())
    def request(self, data) -> None:
        """A request arrives, of an adapter or the base model."""
        key = data.draw(st.sampled_from([None, *sorted(self.pools[0].loaded)]))
        self.ranks.call(lambda pool: pool.arrived(key, None))

    @precondition(lambda self: self.ranks.reads[0].found)
    @rule(data=st.data())
    def arrive(self, data) -> None:
        """TP rank 0 tells that some reads are done, in any order."""
        numbers = data.draw(st.permutations(sorted(self.ranks.reads[0].found)))
        self.ranks.arrive(
            lambda pool, decision: pool.images.arrived(decision), *numbers[: data.draw(st.integers(1, 3))]
        )

    @precondition(lambda self: self.pools[0].loaded)
    @rule(data=st.data())
    def run(self, data) -> None:
        """A batch asks for adapters until they are there or have failed."""
        keys = data.draw(st.lists(st.sampled_from([*sorted(self.pools[0].loaded), "unknown"]), unique=True))
        wanted = set(keys) - {"unknown"}
        pinned = {key for key, one in self.pools[0].loaded.items() if one.pinned}
        room = sum(self.pools[0].loaded[key].slots for key in wanted | pinned) <= SLOTS and len(wanted) <= 4
        for _ in range(2 * len(wanted) + 1):
            admitted = self.ranks.call(lambda pool: pool.bring_in(keys if pool is self.pools[0] else reversed(keys)))
            failures = self.ranks.call(lambda pool: pool.images.take_failures())
            if admitted or failures or not self.ranks.reads[0].found:
                break
            self.ranks.arrive(lambda pool, decision: pool.images.arrived(decision))
        else:
            raise AssertionError("adapters are read for ever")
        for key in failures:
            assert f"a{key.removeprefix('key')}" in self.broken, "a sound read failed"
        if not admitted:
            assert failures or not room, "what fits and can be read was refused"
        if not admitted:
            return
        self.ranks.call(lambda pool: pool.begin_step(keys))
        for pool in self.pools:
            for key in wanted:
                rows = pool.arena._rows[:, :, pool.resident[key].slots]
                assert (rows == float(key.removeprefix("key"))).all(), "rows of another adapter"

    @invariant()
    def sound(self) -> None:
        for pool in self.pools:
            pool.check_integrity()
            assert pool.images.host.used_bytes <= HOST_SLOTS
        first, second = ([(k, r.slots.tolist()) for k, r in pool.resident.items()] for pool in self.pools)
        assert first == second
        first, second = (list(pool.images.host._entries) for pool in self.pools)
        assert first == second, "the host tiers differ"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_every_adapter_that_is_accepted_can_run_alone_beside_the_pinned_ones() -> None:
    pool = new_pool()
    pool.add("p", *numbered(0, SLOTS // 2, pinned=True))
    assert pool.bring_in(["p"])
    assert pool.reason_not_to_add(1, pinned=True) is not None
    assert pool.reason_not_to_add(SLOTS // 2 + 1, pinned=False) is not None
    assert pool.reason_not_to_add(SLOTS // 2, pinned=False) is None
    for number in (1, 2):
        pool.add(f"k{number}", *numbered(number, SLOTS // 2))
        assert pool.bring_in([f"k{number}"])
        assert set(pool.resident) == {"p", f"k{number}"}, "the pinned adapter stays, the other makes room"


def test_batch_limit_counts_adapters_not_the_base_model() -> None:
    pool = new_pool()
    for number in range(5):
        pool.add(str(number), *numbered(number, 1))
    assert pool.bring_in(["0", "1", "2", "3"])
    assert not pool.bring_in(["0", "1", "2", "3", "4"])


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
