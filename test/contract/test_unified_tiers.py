"""Unified memory over tiers that fail, on SGLang's real tree and allocator: two TP ranks with a disk each."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from blocklora_testing.ranks import HandReads, Ranks
from blocklora_testing.real_cache import new_cache
from blocklora_testing.tiers import LAYERS, WIDTH, Disk, numbered
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.unified_pool import KVArena, UnifiedPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.scheduler.admission import _get_new_batch_prefill

POOL_TOKENS = 192
HOST_SLOTS = 150


class Rank:
    """One TP rank: its pool, its tree and allocator, and its KV buffers."""

    def __init__(self, page_size: int, images: ImageStore) -> None:
        self.cache = new_cache(page_size, POOL_TOKENS)
        self.pool = UnifiedPool(4, images, DecisionLog(None, 0))
        buffers = [torch.full((POOL_TOKENS + page_size, 1, WIDTH), float("nan")) for _ in range(2 * LAYERS)]
        self.pool.bind_arena(KVArena(buffers[:LAYERS], buffers[LAYERS:]), POOL_TOKENS)
        self.pool.bind_cache(self.cache)

    def rows(self, key: str) -> torch.Tensor:
        """What an adapter's slots hold, in every layer and plane."""
        slots = self.pool.resident[key].slots[: self.pool.loaded[key].slots]
        return torch.stack([plane[slots] for layer in self.pool.arena.planes for plane in layer])


class TiersMachine(RuleBasedStateMachine):
    """Loads, unloads, folders that vanish or change on one rank, reads ahead, admission and flushes."""

    @initialize(page_size=st.sampled_from([1, 16]))
    def make(self, page_size: int) -> None:
        self.disks = [Disk(), Disk()]
        self.ranks = Ranks(lambda rank, reads: Rank(page_size, self.images(rank, reads)))
        self.count = 0
        self.broken: set[str] = set()  # adapters that a disk did not have as they were, now or before

    def images(self, rank: int, reads) -> ImageStore:
        return ImageStore(HOST_SLOTS, 1, self.disks[rank].read, reads, DecisionLog(None, rank))

    def keys(self) -> list[str]:
        return sorted(self.ranks.objects[0].pool.loaded)

    @rule(slots=st.integers(1, 90), pinned=st.booleans())
    def load(self, slots: int, pinned: bool) -> None:
        if self.ranks.objects[0].pool.reason_not_to_add(slots, pinned) is None:
            self.ranks.call(lambda rank: rank.pool.add(f"{self.count:032d}", *numbered(self.count, slots, pinned)))
            self.count += 1

    @precondition(lambda self: self.keys())
    @rule(data=st.data())
    def unload(self, data) -> None:
        key = data.draw(st.sampled_from(self.keys()))
        self.ranks.call(lambda rank: rank.pool.remove(key))

    @precondition(lambda self: self.count)
    @rule(data=st.data(), rank=st.integers(0, 1), state=st.sampled_from(["", "gone", "other"]))
    def change_disk(self, data, rank: int, state: str) -> None:
        name = f"a{data.draw(st.integers(0, self.count - 1))}"
        self.disks[rank].states[name] = state
        self.broken |= {name} if state else set()

    @precondition(lambda self: self.keys())
    @rule(data=st.data())
    def prefetch(self, data) -> None:
        keys = data.draw(st.lists(st.sampled_from(self.keys()), unique=True))
        self.ranks.call(lambda rank: rank.pool.prefetch(keys))

    @precondition(lambda self: self.ranks.reads[0].found)
    @rule(data=st.data())
    def arrive(self, data) -> None:
        """TP rank 0 tells that some reads are done, in any order."""
        numbers = data.draw(st.permutations(sorted(self.ranks.reads[0].found)))[: data.draw(st.integers(1, 3))]
        self.ranks.arrive(lambda rank, decision: rank.pool.images.arrived(decision), *numbers)

    @precondition(lambda self: self.keys())
    @rule(data=st.data())
    def admit(self, data) -> None:
        key = data.draw(st.sampled_from(self.keys()))
        name = f"a{int(key)}"
        at_hand = self.ranks.call(lambda rank: rank.pool.is_resident(key) or rank.pool.images.in_host_memory(key))
        room = self.ranks.call(lambda rank: rank.pool.is_resident(key) or rank.cache.has_room(key))
        admitted = self.ranks.call(lambda rank: rank.pool.bring_in([key]))
        if not room:
            assert not admitted
            return
        assert admitted == at_hand, "it waited for a read, or did not take what was there"
        if not at_hand and self.ranks.call(lambda rank: rank.pool.images.is_being_read(key)):
            self.ranks.arrive(lambda rank, decision: rank.pool.images.arrived(decision))
            admitted = self.ranks.call(lambda rank: rank.pool.bring_in([key]))
        failures = self.ranks.call(lambda rank: rank.pool.images.take_failures())
        assert {f"a{int(failed)}" for failed in failures} <= self.broken, "an adapter with a sound folder was refused"
        assert admitted == (key not in failures)
        if not admitted:
            assert name in self.broken
            assert not self.ranks.call(lambda rank: rank.pool.is_resident(key))
            return
        self.ranks.call(lambda rank: rank.pool.begin_step([key]))
        for rank in self.ranks.objects:
            assert (rank.rows(key) == float(int(key))).all(), "rows of another adapter"

    @rule()
    def flush(self) -> None:
        def action(rank: Rank) -> None:
            rank.cache.reset()
            rank.cache.token_to_kv_pool_allocator.clear()

        self.ranks.call(action)

    @invariant()
    def no_slot_is_lost(self) -> None:
        for rank in self.ranks.objects:
            free = rank.cache.token_to_kv_pool_allocator.available_size()
            assert free + rank.cache.evictable_size() + rank.cache.protected_size() == POOL_TOKENS
            assert rank.pool.images.host.used_bytes <= HOST_SLOTS


TestTiers = TiersMachine.TestCase
TestTiers.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_requests_of_an_adapter_that_could_not_be_read_are_answered_and_no_others() -> None:
    """And of the rest, the adapters are read ahead."""
    images = ImageStore(0, 1, Disk().read, HandReads(), DecisionLog(None, 0))
    images.failures["bad"] = "adapter 'bad' is gone"
    answered: list[tuple[str, str]] = []
    ahead: list[list[str]] = []
    pool = SimpleNamespace(images=images, prefetch=lambda keys: ahead.append(list(keys)))
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=SimpleNamespace(pool=pool))),
        retire_unadmitted_request=lambda req: answered.append((req.name, req.message[0])),
    )
    requests = []
    for name, lora_id in (("1", "bad"), ("2", None), ("3", "good"), ("4", "bad")):
        message: list[str] = []
        requests.append(
            SimpleNamespace(name=name, lora_id=lora_id, message=message, set_finish_with_abort=message.append)
        )
    scheduler.waiting_queue = requests
    _get_new_batch_prefill(None, scheduler, None)
    assert answered == [("1", "adapter 'bad' is gone"), ("4", "adapter 'bad' is gone")]
    assert [request.name for request in scheduler.waiting_queue] == ["2", "3"]
    _get_new_batch_prefill(None, scheduler, None)
    assert len(answered) == 2
    assert ahead == [["good"], ["good"]]
