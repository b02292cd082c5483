"""The cache in which adapters are prefixes, on SGLang's real tree and allocator, under random operations."""

from __future__ import annotations

import pytest
from blocklora_testing.cache_machine import (
    POOL_TOKENS,
    RADIX_EVICTION_POLICY_CHOICES,
    CacheMachine,
    EvictParams,
    MatchPrefixParams,
)
from blocklora_testing.real_cache import AdapterPrefixCache, UnifiedRadixCache, digest, key_of
from blocklora_testing.upstream import insert_params, matched_slots
from hypothesis import settings
from sglang_blocklora.memory.eviction import CostAware, KVFirst


def test_only_these_methods_of_upstream_are_overridden() -> None:
    """Upstream's cache has many methods; one of ours with a name of theirs would break it in silence."""
    inherited = {name for base in UnifiedRadixCache.__mro__[:-1] for name in vars(base)}
    ours = AdapterPrefixCache.__mro__[: AdapterPrefixCache.__mro__.index(UnifiedRadixCache)]
    own = {name for base in ours for name in vars(base) if not name.startswith("_")}
    everywhere = {"reset", "evict", "evict_for_alloc", "insert", "take_events", "inc_lock_ref", "dec_lock_ref"}
    since_0_5_22 = {"touch_prefix", "path_device_indices", "prefix_device_indices"}
    assert own & inherited == everywhere | (since_0_5_22 if since_0_5_22 <= inherited else {"match_prefix"})


def test_a_pinned_adapter_stays_until_it_is_unpinned() -> None:
    machine = CacheMachine()
    machine.make(16)
    lora_id = digest("pinned")[:32]
    machine.cache.know(lora_id, digest("P"), 20)
    machine.adapters[lora_id] = "P"
    assert machine.make_resident(lora_id)
    machine.cache.pin_adapter(lora_id)
    machine.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert machine.cache.slots_of(lora_id) is not None
    machine.cache.unpin_adapter(lora_id)
    machine.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert machine.cache.slots_of(lora_id) is None
    assert machine.cache.token_to_kv_pool_allocator.available_size() == POOL_TOKENS


def test_nothing_is_evicted_for_an_adapter_that_does_not_fit_anyway() -> None:
    machine, ids = three_adapters_with_kv(1)
    machine.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    machine.allocate(150)
    assert machine.make_resident(ids["A"])
    machine.cache.know("big", digest("big"), 43)
    assert machine.cache.reserve("big") is None
    assert resident(machine, ids) == "A"
    machine.cache.know("fits", digest("fits"), 42)
    assert machine.cache.reserve("fits") is not None
    assert resident(machine, ids) == ""


def three_adapters_with_kv(page_size: int, eviction_policy: str = "lru") -> tuple[CacheMachine, dict[str, str]]:
    """A, B and C of 32 slots each, asked for in this order, each with 16 slots of KV behind it; the ids of each."""
    machine = CacheMachine()
    machine.make(page_size, eviction_policy=eviction_policy)
    ids = {contents: digest(f"{contents} of 32")[:32] for contents in "ABC"}
    for contents, lora_id in ids.items():
        machine.cache.know(lora_id, digest(f"{contents} of 32"), 32)
        machine.adapters[lora_id] = f"{contents} of 32"
        assert machine.make_resident(lora_id)
        own = machine.allocate(16)
        machine.cache.insert(insert_params(key_of(range(16), lora_id), own, 0))
    return machine, ids


def resident(machine: CacheMachine, ids: dict[str, str]) -> str:
    return "".join(contents for contents, lora_id in ids.items() if machine.cache.slots_of(lora_id) is not None)


@pytest.mark.parametrize("eviction_policy", RADIX_EVICTION_POLICY_CHOICES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_kv_first_gives_up_all_kv_and_then_adapters_by_last_use(page_size: int, eviction_policy: str) -> None:
    machine, ids = three_adapters_with_kv(page_size, eviction_policy)
    cache = machine.cache
    cache.strategy = KVFirst()
    for contents in "CAB":
        cache.arrived(ids[contents], key_of([1], ids[contents]))
    found = []
    for count in (48, 1, 32, 1):
        evicted = cache.evict(EvictParams(num_tokens=count)).num_tokens_evicted
        assert evicted >= count
        found.append((evicted, resident(machine, ids)))
        cache.check_slots(in_use=0)
    assert found == [(48, "ABC"), (32, "AB"), (32, "B"), (32, "")]
    assert cache.token_to_kv_pool_allocator.available_size() == POOL_TOKENS


def test_lru_evicts_an_idle_adapter_before_newer_kv() -> None:
    machine, ids = three_adapters_with_kv(1)
    machine.cache.evict(EvictParams(num_tokens=17))
    assert resident(machine, ids) == "BC"


@pytest.mark.parametrize(("copy_tokens_per_slot", "left"), [(0.0, "BC"), (100.0, "ABC")])
def test_cost_aware_weighs_adapters_against_kv(copy_tokens_per_slot: float, left: str) -> None:
    """Each arrival finds its 16 tokens cached; what an adapter is worth beside that follows from its copy's cost."""
    machine, ids = three_adapters_with_kv(1)
    machine.cache.strategy = CostAware(copy_tokens_per_slot)
    for lora_id in ids.values():
        key = key_of(range(16), lora_id)
        assert machine.cache.cached_tokens(key) == 16
        machine.cache.arrived(lora_id, key)
    machine.cache.evict(EvictParams(num_tokens=17))
    assert resident(machine, ids) == left


TestCache = CacheMachine.TestCase
# More than 10,000 steps.
TestCache.settings = settings(max_examples=260, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("page_size", [1, 16])
def test_reloading_the_same_bytes_hits_and_other_bytes_do_not(page_size: int) -> None:
    machine = CacheMachine()
    machine.make(page_size)
    tokens = range(3, 3 + 40)
    ids = [digest(str(i))[:32] for i in range(3)]
    for lora_id, contents in zip(ids, "PPQ", strict=True):
        machine.cache.know(lora_id, digest(contents), 20)
        machine.adapters[lora_id] = contents
    assert machine.make_resident(ids[0])
    own = machine.allocate(-(-40 // page_size) * page_size)
    aligned = 40 // page_size * page_size
    machine.cache.insert(insert_params(key_of(tokens, ids[0]).page_aligned(page_size), own[:aligned], 0))
    machine.cache.token_to_kv_pool_allocator.free(own[aligned:])

    def hit(lora_id: str | None, user: str | None = None) -> int:
        found = machine.cache.match_prefix(MatchPrefixParams(key=key_of(tokens, lora_id, user)))
        return len(matched_slots(machine.cache, found))

    assert hit(ids[0]) == hit(ids[1]) == aligned, "the same bytes under another id"
    assert hit(ids[0], "user") == 0
    assert machine.make_resident(ids[2])
    assert hit(ids[2]) == 0, "other bytes"
    assert hit(None) == 0, "the base model"
