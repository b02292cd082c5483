"""The cache in which adapters are prefixes, on SGLang's real tree and allocator, under random operations."""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.unified_radix_cache import AdapterPrefixCache
    from sglang.srt.arg_groups.choices import RADIX_EVICTION_POLICY_CHOICES
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang_blocklora.memory.eviction import STRATEGIES, CostAware, KVFirst

POOL_TOKENS = 192


def new_cache(page_size: int, eviction_policy: str = "lru") -> AdapterPrefixCache:
    """A cache over a pool of ``POOL_TOKENS`` slots, as SGLang's registry builds it."""
    arguments = (torch.float32, "cpu", None, False)
    if page_size == 1:
        allocator = TokenToKVPoolAllocator(POOL_TOKENS, *arguments)
    else:
        allocator = PagedTokenToKVPoolAllocator(POOL_TOKENS, page_size, *arguments)
    requests = ReqToTokenPool(size=8, max_context_len=64, device="cpu", enable_memory_saver=False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        tree_components=(ComponentType.FULL,),
        eviction_policy=eviction_policy,
    )
    return AdapterPrefixCache(params)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Running:
    """A request that holds a lock: its key, what it matched, and the slots it allocated itself."""

    key: RadixKey
    contents: str
    salt: str
    matched: torch.Tensor
    own: torch.Tensor
    node: object
    receipt: object
    adapter: str | None


class CacheMachine(RuleBasedStateMachine):
    """``memory[slot]`` says what was written there: an adapter's row, or a token path in a namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[Running] = []
        self.adapters: dict[str, str] = {}  # lora_id -> contents
        self.sizes: dict[str, int] = {}  # contents -> slots
        self.count = 0

    @initialize(
        page_size=st.sampled_from([1, 16]),
        strategy=st.sampled_from(sorted(STRATEGIES)),
        eviction_policy=st.sampled_from(RADIX_EVICTION_POLICY_CHOICES),
    )
    def make(self, page_size: int, strategy: str = "lru", eviction_policy: str = "lru") -> None:
        self.page_size = page_size
        self.cache = new_cache(page_size, eviction_policy)
        self.cache.strategy = STRATEGIES[strategy]()
        self.memory = ["" for _ in range(POOL_TOKENS + page_size)]

    @rule(contents=st.sampled_from("ABCD"), slots=st.integers(1, 70))
    def load(self, contents: str, slots: int) -> None:
        """A new name for new or known bytes: reloading is loading the same contents under a new id."""
        lora_id = digest(f"id{self.count}")[:32]
        self.count += 1
        self.sizes.setdefault(contents, slots)
        self.cache.know(lora_id, digest(contents), self.sizes[contents])
        self.adapters[lora_id] = contents

    @precondition(lambda self: self.adapters)
    @rule(data=st.data())
    def unload(self, data) -> None:
        """The name goes; the tree keeps what is cached until it is evicted."""
        del self.adapters[data.draw(st.sampled_from(sorted(self.adapters)))]

    def make_resident(self, lora_id: str) -> bool:
        contents = self.adapters[lora_id]
        slots = self.cache.slots_of(lora_id)
        if slots is None:
            slots = self.cache.reserve(lora_id)
            if slots is None:
                return False
            for row, slot in enumerate(slots.tolist()):
                self.memory[slot] = f"weights {contents} {row}"
            self.cache.publish(lora_id, slots)
        return True

    @rule(
        data=st.data(),
        tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40),
        user=st.sampled_from([None, "u"]),
        salt=st.sampled_from([None, "s", "t"]),
    )
    def start(self, data, tokens: list[int], user: str | None, salt: str | None) -> None:
        """Admit a request: adapter, match, lock, then slots for what did not match."""
        if len(self.running) == 4:
            return
        lora_id = data.draw(st.sampled_from([None, *sorted(self.adapters)]))
        key = RadixKey(array("q", tokens), ((user or "") + (lora_id or "")) or None, cache_salt=salt)
        contents = self.adapters[lora_id] if lora_id else "base"
        self.cache.arrived(lora_id, key)
        if lora_id and self.cache.slots_of(lora_id) is None:
            missed = self.cache.match_prefix(MatchPrefixParams(key=key))
            assert len(missed.device_indices) == 0, "KV without its adapter"
            assert missed.last_device_node == self.cache.root_node_handle()
        if lora_id and not self.make_resident(lora_id):
            return
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        matched = found.device_indices
        space = f"{contents}|{user}|{salt}"
        assert [self.memory[s] for s in matched.tolist()] == self.path(space, tokens[: len(matched)])
        receipt = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        needed = -(-(len(tokens) - len(matched)) // self.page_size) * self.page_size
        own = self.allocate(needed)
        if own is None:
            self.cache.dec_lock_ref(found.last_device_node, receipt)
            return
        for slot, text in zip(own.tolist(), self.path(space, tokens)[len(matched) :], strict=False):
            self.memory[slot] = text
        self.running.append(Running(key, contents, space, matched, own, found.last_device_node, receipt, lora_id))

    def path(self, space: str, tokens: list[int]) -> list[str]:
        return [f"{space} {tokens[: i + 1]}" for i in range(len(tokens))]

    def allocate(self, count: int) -> torch.Tensor | None:
        allocator = self.cache.token_to_kv_pool_allocator
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        shortfall = count - allocator.available_size()
        if shortfall > 0:
            self.cache.evict(EvictParams(num_tokens=shortfall))
        return allocator.alloc(count)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), keep=st.booleans())
    def finish(self, data, keep: bool) -> None:
        """A request ends: its KV goes into the tree (or is thrown away), and its lock goes."""
        request = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        allocator = self.cache.token_to_kv_pool_allocator
        values = torch.cat([request.matched, request.own])
        aligned = len(request.key) // self.page_size * self.page_size
        if keep:
            self.cache.insert(
                InsertParams(
                    key=request.key.page_aligned(self.page_size),
                    value=values[:aligned],
                    prev_prefix_len=len(request.matched),
                )
            )
            allocator.free(values[aligned:])
        else:
            allocator.free(request.own)
        self.cache.dec_lock_ref(request.node, request.receipt)

    @rule(count=st.integers(1, POOL_TOKENS))
    def evict(self, count: int) -> None:
        self.cache.evict(EvictParams(num_tokens=count))

    @precondition(lambda self: not self.running)
    @rule()
    def flush(self) -> None:
        """Upstream flushes when idle: the tree and the allocator start anew, adapters' names stay."""
        self.cache.reset()
        self.cache.token_to_kv_pool_allocator.clear()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "cache"):
            return
        own = sum(len(request.own) for request in self.running)
        free = self.cache.token_to_kv_pool_allocator.available_size()
        total = free + self.cache.evictable_size() + self.cache.protected_size() + own
        assert total == POOL_TOKENS, "free + cached + in use is not the pool"
        if not self.running:
            assert self.cache.protected_size() == 0, "a lock outlived its request"
        for request in self.running:
            if request.adapter is not None:
                assert self.cache.slots_of(request.adapter) is not None, "a running request lost its adapter"
        for lora_id, contents in self.adapters.items():
            slots = self.cache.slots_of(lora_id)
            if slots is not None:
                rows = [self.memory[s] for s in slots.tolist()]
                assert rows == [f"weights {contents} {row}" for row in range(len(rows))], "weights overwritten"


def test_only_these_methods_of_upstream_are_overridden() -> None:
    """Upstream's cache has many methods; one of ours with a name of theirs would break it in silence."""
    inherited = {name for base in AdapterPrefixCache.__mro__[1:-1] for name in vars(base)}
    own = {name for name in vars(AdapterPrefixCache) if not name.startswith("_")}
    assert own & inherited == {"reset", "evict", "evict_for_alloc", "match_prefix", "insert", "take_events"}


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


def three_adapters_with_kv(page_size: int, eviction_policy: str = "lru") -> tuple[CacheMachine, dict[str, str]]:
    """A, B and C of 32 slots each, asked for in this order, each with 16 slots of KV behind it; the ids of each."""
    machine = CacheMachine()
    machine.make(page_size, eviction_policy=eviction_policy)
    ids = {contents: digest(contents)[:32] for contents in "ABC"}
    for contents, lora_id in ids.items():
        machine.cache.know(lora_id, digest(contents), 32)
        machine.adapters[lora_id] = contents
        assert machine.make_resident(lora_id)
        own = machine.allocate(16)
        machine.cache.insert(InsertParams(key=RadixKey(array("q", range(16)), lora_id), value=own))
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
        cache.arrived(ids[contents], RadixKey(array("q", [1]), ids[contents]))
    found = []
    for count in (48, 1, 32, 1):
        evicted = cache.evict(EvictParams(num_tokens=count)).num_tokens_evicted
        assert evicted >= count
        found.append((evicted, resident(machine, ids)))
        machine.sound()
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
        key = RadixKey(array("q", range(16)), lora_id)
        assert machine.cache.cached_tokens(key) == 16
        machine.cache.arrived(lora_id, key)
    machine.cache.evict(EvictParams(num_tokens=17))
    assert resident(machine, ids) == left


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("page_size", [1, 16])
def test_reloading_the_same_bytes_hits_and_other_bytes_do_not(page_size: int) -> None:
    machine = CacheMachine()
    machine.make(page_size)
    tokens = array("q", range(3, 3 + 40))
    ids = [digest(str(i))[:32] for i in range(3)]
    for lora_id, contents in zip(ids, "AAB", strict=True):
        machine.cache.know(lora_id, digest(contents), 20)
        machine.adapters[lora_id] = contents
    assert machine.make_resident(ids[0])
    own = machine.allocate(-(-40 // page_size) * page_size)
    aligned = 40 // page_size * page_size
    machine.cache.insert(InsertParams(key=RadixKey(tokens, ids[0]).page_aligned(page_size), value=own[:aligned]))
    machine.cache.token_to_kv_pool_allocator.free(own[aligned:])

    def hit(extra_key: str | None) -> int:
        return len(machine.cache.match_prefix(MatchPrefixParams(key=RadixKey(tokens, extra_key))).device_indices)

    assert hit(ids[0]) == hit(ids[1]) == aligned, "the same bytes under another id"
    assert hit("user" + ids[0]) == 0
    assert machine.make_resident(ids[2])
    assert hit(ids[2]) == 0, "other bytes"
    assert hit(None) == 0, "the base model"
