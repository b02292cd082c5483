"""Nothing a client sends reaches an adapter's weights or anyone else's KV: on SGLang's real tree and requests."""

from __future__ import annotations

import warnings
from array import array
from types import SimpleNamespace

import pytest
import torch
from blocklora_testing import upstream
from blocklora_testing.real_cache import AdapterPrefixCache, digest, key_of, new_cache, request_of
from blocklora_testing.tiers import LAYERS, WIDTH, Disk, numbered
from sglang_blocklora.memory.accounting import IntegrityError
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.unified_pool import LINGER_ADAPTERS, LINGER_STEPS, KVArena, UnifiedPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.runtime_context import get_context

POOL_TOKENS = 240
SLOTS = 20
PROMPT = list(range(100, 132))
A, B = digest("id of A")[:32], digest("id of B")[:32]


class Cache:
    """A cache with two adapters, and the keys under which they were published."""

    def __init__(self, page_size: int, core: str = "rust", *, events: bool = False) -> None:
        self.cache = new_cache(page_size, POOL_TOKENS, core=core, events=events)
        self.published: list[RadixKey] = []
        self.cache.know(A, digest("A"), SLOTS)
        self.cache.know(B, digest("B"), SLOTS)

    @property
    def allocator(self):
        return self.cache.token_to_kv_pool_allocator

    def publish(self, lora_id: str) -> None:
        begin = self.cache.tree_core.begin_insert
        self.cache.tree_core.begin_insert = lambda params: (self.published.append(params.key), begin(params))[1]
        self.cache.publish(lora_id, self.cache.reserve(lora_id))
        self.cache.tree_core.begin_insert = begin

    def match(self, key: RadixKey):
        return self.cache.match_prefix(MatchPrefixParams(key=key))

    def found(self, key: RadixKey) -> torch.Tensor:
        return upstream.matched_slots(self.cache, self.match(key))

    def serve(self, key: RadixKey) -> int:
        """One request from its match to its end; how many tokens it found."""
        found = self.match(key)
        receipt = self.cache.inc_lock_ref(found.last_device_node).to_dec_params()
        matched = upstream.matched_slots(self.cache, found)
        own = self.allocator.alloc(len(key) - len(matched)) if len(key) > len(matched) else matched[:0]
        params = upstream.insert_params(key, torch.cat([matched, own]), len(matched))
        if self.cache.insert(params).rotation_tail_declined:
            self.allocator.free(own)
        self.cache.dec_lock_ref(found.last_device_node, receipt)
        self.cache.check_slots(in_use=0)
        return len(matched)


def hostile_keys(published: RadixKey) -> list[RadixKey]:
    """What clients could send who know everything of an adapter: its ids, its contents, and how the cache works."""
    marks = [*published.raw_token_ids()]
    names = [None, published.extra_key, digest("A"), A, f"32:{A}", f"{A}|", ":", f":{digest('A')}"]
    return [
        key_of([*marks, *tokens], lora_id, own, salt)
        for tokens in ([], PROMPT)
        for lora_id in (None, B)
        for own in names
        for salt in (None, published.cache_salt, digest("A"))
    ]


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_no_request_finds_or_writes_what_is_an_adapters(page_size: int, core: str) -> None:
    """Before the adapter is there, while it is, and after a flush."""
    made = Cache(page_size, core)
    cache = made.cache
    made.publish(A)
    (published,) = made.published
    made.publish(B)
    own = made.serve(key_of(PROMPT, A))
    assert own == 0
    right = made.found(key_of(PROMPT, A))
    for key in hostile_keys(published):
        with_b = key.extra_key is not None and B in key.extra_key
        before = set(right.tolist()) | set(cache.slots_of(A).tolist())
        found = made.found(key)
        assert not before & set(found.tolist()), "a request was given an adapter's slots"
        if with_b:
            assert not set(found.tolist()) & set(cache.slots_of(B).tolist())
        if len(key) <= made.allocator.available_size():
            made.serve(key)
        assert torch.equal(made.found(key_of(PROMPT, A)), right)
        assert min([*cache.slot_counts().kv.values(), *cache.slot_counts().adapters.values()]) > 0
    for key in hostile_keys(published):
        cache.reset()
        made.allocator.clear()
        if B in str(key.extra_key):
            made.publish(B)
        made.serve(key)
        made.publish(A)
        assert len(made.found(key_of(PROMPT, A))) == 0, "KV of someone else"
        made.serve(key_of(PROMPT, A))
        cache.check_slots(in_use=0)


@pytest.mark.parametrize("page_size", [1, 4])
def test_an_adapters_kv_is_found_under_its_own_extra_key_and_salt_only(page_size: int) -> None:
    made = Cache(page_size)
    made.publish(A)
    spaces = [(None, None), ("s", None), (None, "s"), ("a", "bc"), ("ab", "c"), ("0", None), (digest("A"), None)]
    for own, salt in spaces:
        assert made.serve(key_of(PROMPT[:4], A, own, salt)) == 0
    for own, salt in spaces:
        assert made.serve(key_of(PROMPT[:4], A, own, salt)) == 4
    assert made.cache.slot_counts().adapters == {digest("A"): SLOTS}, "one copy of the weights"


@pytest.mark.parametrize("core", ["rust", "python"])
@pytest.mark.parametrize("page_size", [1, 4])
def test_what_is_behind_an_invocation_is_found_by_its_adapter_alone(page_size: int, core: str) -> None:
    made, (e, f) = Cache(page_size, core), (digest("id of E")[:32], digest("id of F")[:32])
    for lora_id, contents in ((e, "E"), (f, "F")):
        made.cache.know(lora_id, digest(contents), SLOTS, activated=True)
        made.publish(lora_id)
    assert made.serve(key_of(PROMPT, e, activated_from=10)) == 0
    shared = 10 // page_size * page_size
    for key in (key_of(PROMPT), key_of(PROMPT, f, activated_from=10), key_of(PROMPT, e, activated_from=11)):
        assert len(made.found(key)) == shared, "the base model's and no more"
    for key in (key_of(PROMPT, e, "s", activated_from=10), key_of(PROMPT, None, "s"), key_of(PROMPT, A)):
        assert len(made.found(key)) == 0
    assert len(made.found(key_of(PROMPT, e, activated_from=10))) == len(PROMPT)
    for number in range(4):  # what a client could send who knows how the tree marks them
        disguised = [*PROMPT[:10], *(1 << 62 | number << 32 | token for token in PROMPT[10:])]
        for lora_id, first in ((None, None), (f, 10), (e, 5)):
            found = made.found(key_of(disguised, lora_id, activated_from=first))
            assert len(found) <= shared, "an adapter's KV"
    made.cache.check_slots(in_use=0)
    made.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert made.allocator.available_size() == POOL_TOKENS


def test_kv_of_an_activated_adapter_waits_for_its_weights() -> None:
    made, e = Cache(1), digest("id of E")[:32]
    made.cache.know(e, digest("E"), SLOTS, activated=True)
    made.publish(e)
    key = key_of(PROMPT, e, activated_from=10)
    made.serve(key)
    found = made.match(key).last_device_node  # as a running request has it
    receipt = made.cache.inc_lock_ref(found).to_dec_params()
    made.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert made.cache.slots_of(e) is not None, "the weights of a running request went"
    made.cache.dec_lock_ref(found, receipt)
    made.cache.tree_core.inc_full_pin(int(found))  # the KV alone
    made.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    made.cache.tree_core.dec_full_pin(int(found))
    assert made.cache.slots_of(e) is None
    assert len(made.found(key)) == len(PROMPT)
    made.cache.check_slots(in_use=0)
    made.cache.forget(e)
    again = digest("again")[:32]
    made.cache.know(again, digest("E"), SLOTS, activated=True)
    assert len(made.found(key_of(PROMPT, again, activated_from=10))) == len(PROMPT), "the same bytes, loaded again"
    made.cache.reset()
    made.allocator.clear()
    assert len(made.found(key_of(PROMPT, again, activated_from=10))) == 0


@pytest.mark.parametrize("wrong", [-1, 1 << 32, 1 << 62, -(1 << 63), (1 << 63) - 1])
@pytest.mark.parametrize("lora_id", [None, A])
@pytest.mark.parametrize("salt", [None, "s"])
def test_what_is_behind_an_id_of_no_vocabulary_is_not_cached(salt: str | None, lora_id: str | None, wrong: int) -> None:
    made = Cache(4, events=True)
    made.publish(A)
    made.publish(B)
    made.serve(key_of(PROMPT, lora_id, None, salt))
    made.cache.take_events()
    tokens = [*PROMPT[:16], wrong, *PROMPT[17:]]
    for _ in range(2):
        found = made.serve(key_of(tokens, lora_id, None, salt))
        assert found == (16 if lora_id is None else 0), "without an adapter, what was cached before the wrong id"
    assert made.cache.take_events() == []
    found = made.match(key_of(tokens, lora_id, None, salt))
    receipt = made.cache.inc_lock_ref(found.last_device_node).to_dec_params()
    made.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert made.cache.slots_of(B) is None
    assert (made.cache.slots_of(A) is not None) == (lora_id == A), "its adapter was evicted under it"
    made.cache.dec_lock_ref(found.last_device_node, receipt)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("lora_id", [None, A, "unknown"])
def test_upstreams_own_steps_of_a_request_that_is_not_cached_leave_nothing_behind(
    lora_id: str | None, ends: bool
) -> None:
    """Prefill in two chunks, the second with an id that is none; then it ends, or is retracted."""
    made = Cache(4)
    cache = made.cache
    made.publish(A)
    free, pool = made.allocator.available_size(), cache.req_to_token_pool
    request = request_of([*range(8), -5, *range(7)], lora_id)
    slots = made.allocator.alloc(16)
    assert pool.alloc([request])
    pool.write((request.kv.req_pool_idx, slice(0, 16)), slots)
    found = made.match(key_of([], lora_id))
    request.last_node = found.last_device_node
    upstream.lock_match(cache, request)
    for end in (8, 16):
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.get_fill_ids = lambda end=end: request.origin_input_ids[:end]
        request.extend_end = end
        upstream.keep_computed(cache, request, more_prompt=True)
        kept = 8 if lora_id != "unknown" else 0
        assert request.kv.cache_protected_len == kept
        assert upstream.prefix_slots(cache, request).tolist() == slots[:end].tolist()
    request.kv.kv_allocated_len = request.kv.kv_committed_len = 16
    with get_context().override_server_args(device="cpu"):
        upstream.release(cache, request, keep=ends)
    assert made.allocator.available_size() == free - kept
    cache.check_slots(in_use=0)


def test_an_adapter_is_published_where_nothing_is_or_not_at_all() -> None:
    made = Cache(1)
    made.publish(A)
    state = made.cache.slots_of(A), made.allocator.available_size()
    slots = made.allocator.alloc(SLOTS)
    with pytest.raises(IntegrityError, match="cannot be published"):
        made.cache.publish(A, slots)
    made.cache.give_back(slots)
    assert (made.cache.slots_of(A), made.allocator.available_size()) == state
    foreign = RadixKey(array("q", made.published[0].raw_token_ids()), digest("B"))
    super(AdapterPrefixCache, made.cache).insert(InsertParams(key=foreign[:3], value=made.allocator.alloc(3)))
    slots = made.cache.reserve(B)
    with pytest.raises(IntegrityError, match="3 of which are in the tree"):
        made.cache.publish(B, slots)
    made.cache.give_back(slots)
    assert made.cache.slots_of(B) is None


def test_kv_behind_weights_that_the_tree_lost_is_not_kept() -> None:
    """It cannot happen; if it does, nothing is written over anything."""
    made = Cache(1)
    made.publish(A)
    assert made.allocator.available_size() == POOL_TOKENS - SLOTS
    super(AdapterPrefixCache, made.cache).evict(EvictParams(num_tokens=SLOTS))
    own = made.allocator.alloc(8)
    result = made.cache.insert(InsertParams(key=key_of(range(8), A), value=own))
    assert result.rotation_tail_declined
    assert made.cache.cached_tokens(key_of(range(8), A)) == 0
    made.allocator.free(own)
    assert made.allocator.available_size() == POOL_TOKENS
    with pytest.raises(IntegrityError, match="lost slots of a resident adapter"):
        made.cache.check_slots(in_use=0)


def test_a_fault_of_the_account_is_an_exception_that_says_what() -> None:
    made = Cache(1)
    made.publish(A)
    with pytest.raises(IntegrityError, match="slots leaked or were freed twice, 1 expected in use"):
        made.cache.check_slots(in_use=1)


class Pool:
    """Unified memory of one TP rank."""

    def __init__(self) -> None:
        self.cache = new_cache(1, POOL_TOKENS)
        images = ImageStore(10 * SLOTS, 1, Disk().read, lambda outcome: [outcome], DecisionLog(None, 0))
        self.pool = UnifiedPool(4, images, DecisionLog(None, 0))
        buffers = [torch.zeros(POOL_TOKENS + 1, 1, WIDTH) for _ in range(2 * LAYERS)]
        self.pool.bind_arena(KVArena(buffers[:LAYERS], buffers[LAYERS:]), POOL_TOKENS)
        self.pool.bind_cache(self.cache)

    def sizes(self) -> dict[str, int]:
        """Of everything that names an adapter."""
        cache, pool = self.cache, self.pool
        entries = cache._entries
        return {
            "contents": len(entries),
            "ids": len(entries._by_id),
            "owners": len(cache._owners._numbers) + len(cache._owners._unused),
            "lingering": len(pool._lingering),
            "rows": len(pool.resident),
        }


def test_ten_thousand_adapters_that_came_and_went_are_forgotten() -> None:
    """New ids and new contents, some served, some of them still in the tree when they are unloaded."""
    made = Pool()
    sizes = []
    for number in range(10_000):
        key = f"{number:032d}"
        made.pool.add(key, *numbered(number, SLOTS, False))
        if number % 3 == 0:
            assert made.pool.bring_in([key])
        if number % 30 == 0:
            made.pool.begin_step([key])
        made.pool.remove(key)
        if number % 100 == 99:
            sizes.append(made.sizes())
    most = {what: max(size[what] for size in sizes) for what in sizes[0]}
    resident = POOL_TOKENS // SLOTS
    assert most["lingering"] <= LINGER_ADAPTERS
    assert most["ids"] <= LINGER_ADAPTERS
    assert most["contents"] <= LINGER_ADAPTERS + resident
    assert most["owners"] <= resident + 1
    assert most["rows"] <= 2 * LINGER_ADAPTERS
    for _ in range(LINGER_STEPS + 1):
        made.pool.begin_step([])
    made.cache.evict(EvictParams(num_tokens=POOL_TOKENS))
    assert made.sizes() == {"contents": 0, "ids": 0, "owners": most["owners"], "lingering": 0, "rows": 0}


def test_an_adapter_whose_place_is_taken_fails_alone() -> None:
    made = Pool()
    key = f"{1:032d}"
    made.pool.add(key, *numbered(1, SLOTS, False))
    free = made.cache.token_to_kv_pool_allocator.available_size()
    spoilt = SimpleNamespace(publish=made.cache.publish)
    made.cache.publish = lambda lora_id, slots: spoilt.publish(lora_id, slots[1:])
    assert not made.pool.bring_in([key])
    assert "cannot be served" in made.pool.images.take_failures()[key]
    assert made.cache.token_to_kv_pool_allocator.available_size() == free
    del made.cache.publish
    assert made.pool.bring_in([key])
