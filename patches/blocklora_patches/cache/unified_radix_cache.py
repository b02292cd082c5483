"""``mem_cache/unified_radix_cache.py``: adapters as prefixes of the radix tree, their weights in its slots.

An adapter that needs S slots is inserted as S pseudo tokens whose values are the slots that hold its weights. The key
of every request with that adapter is the pseudo tokens followed by its own tokens. So SGLang's locks keep an adapter
while a request runs, leaves-first eviction drops KV before its adapter, and all of upstream's accounting counts it.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    zero_match_result,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang_blocklora.memory.accounting import SlotCounts, SlotOwners
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU, EvictionStrategy
from sglang_blocklora.memory.prefix import pseudo_tokens, salted_tokens

from blocklora_patches.cache.events import KVEvents, Namespace

LORA_ID_LENGTH = 32  # hex digits that upstream appends to a request's extra key


@dataclass(frozen=True)
class AdapterPrefix:
    """An adapter's contents, and its slots: a multiple of the page size."""

    content_hash: str
    slots: int

    @property
    def tokens(self) -> array[int]:
        """Pseudo tokens of the slots; not kept here, since prefixes stay known for good."""
        return pseudo_tokens(self.content_hash, self.slots)


@dataclass(frozen=True)
class ResidentAdapter:
    """The tree's node of an adapter (upstream never uses a number again) and its slots, int64 on their device."""

    node: int
    slots: torch.Tensor


class AdapterPrefixCache(UnifiedRadixCache):
    """The default radix cache, in which an adapter is the first part of every key under it.

    Keys without an adapter are upstream's own. ``match_prefix`` never loads anything: an adapter that is not resident
    matches nothing. Loading is ``reserve``, writing the weights to the slots it gives, and ``publish``.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.decisions = DecisionLog(None, 0)  # replaced, as is the strategy, when bound to a server's adapters
        self.strategy: EvictionStrategy = LRU()
        self.on_evicted: Callable[[str], None] = lambda content_hash: None
        self._prefixes: dict[str, AdapterPrefix] = {}
        self._resident: dict[str, ResidentAdapter] = {}  # by content hash, in order of loading
        self._pins: dict[str, int] = {}
        self._events = KVEvents(params.page_size) if params.enable_kv_cache_events else None
        allocator = params.token_to_kv_pool_allocator
        self._owners = SlotOwners(allocator.size + params.page_size, allocator.device)
        super().__init__(dataclasses.replace(params, enable_kv_cache_events=False))

    def reset(self) -> None:
        """Everything is dropped, adapters too, pinned ones among them; upstream calls it to flush an idle server."""
        for content_hash in self._resident:
            self.on_evicted(content_hash)
        self._resident.clear()
        self._pins.clear()
        super().reset()
        if self._events is not None:
            self._events.cleared()

    def know(self, lora_id: str, content_hash: str, slots: int) -> None:
        """Tell how keys of ``lora_id`` look; for good, since a request may outlive its adapter's name by a step."""
        self._prefixes[lora_id] = AdapterPrefix(content_hash, self.slots_needed(slots))

    def slots_needed(self, slots: int) -> int:
        """``slots`` rounded up to whole pages."""
        return -(-slots // self.page_size) * self.page_size

    def slots_of(self, lora_id: str) -> torch.Tensor | None:
        """Slots (int64, on the allocator's device) of an adapter that is resident, else None. Asking is not a use."""
        resident = self._resident.get(self._prefixes[lora_id].content_hash)
        return resident.slots if resident is not None else None

    def nodes_of(self, lora_ids: Iterable[str | None]) -> list[int]:
        """The tree's nodes of those adapters that are resident."""
        known = [self._resident.get(self._prefixes[key].content_hash) for key in lora_ids if key in self._prefixes]
        return [adapter.node for adapter in known if adapter is not None]

    def arrived(self, lora_id: str | None, key: RadixKey) -> None:
        """Tell the strategy of a request that came, once each. ``key`` is as a match would have it."""
        content_hash = self._prefixes[lora_id].content_hash if lora_id in self._prefixes else None
        self.strategy.arrived(content_hash, lambda: self.cached_tokens(key))

    def cached_tokens(self, key: RadixKey) -> int:
        """How many tokens of ``key`` a match would find. Unlike a match it counts as no use."""
        lora_id, own_extra = self._split(key.extra_key)
        if lora_id is None:
            return self.tree_core.match_full_device_prefix(key)[0]
        prefix = self._prefixes[lora_id]
        found = self.tree_core.match_full_device_prefix(self._behind(prefix, key, own_extra))[0]
        return max(found - prefix.slots, 0)

    def can_admit(self, lora_id: str | None) -> bool:
        """Whether a request would find its adapter resident; the base model's (None) needs none."""
        return lora_id not in self._prefixes or self.slots_of(lora_id) is not None

    def slots_held_for(self, lora_id: str | None) -> int:
        """Slots that cannot be freed while a request of ``lora_id`` runs: its adapter's and those of pinned ones."""
        held = [self._prefixes[key] for key in (*self._pins, lora_id) if key in self._prefixes]
        return sum({prefix.content_hash: prefix.slots for prefix in held}.values())

    def has_room(self, lora_id: str, spare: int = 0) -> bool:
        """Whether an adapter's slots and ``spare`` more are free, or are once everything not in use is evicted."""
        shortfall = self._prefixes[lora_id].slots + spare - self.token_to_kv_pool_allocator.available_size()
        return shortfall <= self.evictable_size()

    def reserve(self, lora_id: str) -> torch.Tensor | None:
        """Take free slots for an adapter, evicting what is not in use; None where that is not enough.

        The caller writes the weights to them and then calls ``publish``.
        """
        allocator, needed = self.token_to_kv_pool_allocator, self._prefixes[lora_id].slots
        if not self.has_room(lora_id):
            return None
        if (shortfall := needed - allocator.available_size()) > 0:
            self.evict(EvictParams(num_tokens=shortfall))
        return allocator.alloc(needed)

    def publish(self, lora_id: str, slots: torch.Tensor) -> None:
        """Insert an adapter whose weights lie in ``slots``; from now on the tree owns them."""
        prefix, slots = self._prefixes[lora_id], slots.to(torch.int64)
        inserted = super().insert(InsertParams(key=RadixKey(prefix.tokens), value=slots))
        self._owners.wrote(prefix.content_hash, slots)
        self._resident[prefix.content_hash] = ResidentAdapter(inserted.last_device_node, slots)

    def slot_counts(self) -> SlotCounts:
        """Who has the pool's slots; walks the tree and waits for the device, so it is for reports and checks."""
        allocator, cached = self.token_to_kv_pool_allocator, self.all_values_flatten()
        adapters = {content_hash: len(adapter.slots) for content_hash, adapter in self._resident.items()}
        kv = {owner: count - adapters.get(owner, 0) for owner, count in self._owners.count(cached).items()}
        total, free = allocator.size, allocator.available_size()
        return SlotCounts(total, free, total - free - len(cached), adapters, {o: c for o, c in kv.items() if c})

    def check_slots(self, in_use: int) -> None:
        """``AssertionError`` unless every slot has exactly one owner, ``in_use`` of them requests outside the tree."""
        counts, cached = self.slot_counts(), self.all_values_flatten()
        assert len(cached) == len(cached.unique()), "a slot is in the tree twice"
        assert counts.in_use == in_use, f"slots leaked or freed twice: {counts}, {in_use} expected in use"
        assert len(cached) == self.evictable_size() + self.protected_size(), "the tree's sizes are wrong"
        assert counts.invalid_kv == 0, f"KV without its adapter: {counts}"
        for adapter in self._resident.values():
            assert torch.isin(adapter.slots, cached).all(), "the tree lost slots of a resident adapter"

    def pin_adapter(self, lora_id: str) -> None:
        """Lock a resident adapter until ``unpin_adapter`` or a flush."""
        if lora_id not in self._pins:
            self._pins[lora_id] = node = self._resident[self._prefixes[lora_id].content_hash].node
            self.tree_core.inc_full_pin(node)

    def unpin_adapter(self, lora_id: str) -> None:
        """Undo ``pin_adapter``; nothing where the adapter is not pinned."""
        if lora_id in self._pins:
            self.tree_core.dec_full_pin(self._pins.pop(lora_id))

    @contextmanager
    def keeping(self, nodes: Iterable[int]) -> Iterator[None]:
        """Meanwhile nothing on the way to these nodes is evicted; those that are gone already are passed over."""
        kept = [node for node in nodes if not self._is_gone(node)]
        for node in kept:
            self.tree_core.inc_full_pin(node)
        try:
            yield
        finally:
            for node in kept:
                self.tree_core.dec_full_pin(node)

    def evict(self, params: EvictParams) -> EvictResult:
        return self._evict_by_strategy(super().evict, params)

    def evict_for_alloc(self, params: EvictParams) -> EvictResult:
        return self._evict_by_strategy(super().evict_for_alloc, params)

    def _evict_by_strategy(self, evict: Callable[[EvictParams], EvictResult], params: EvictParams) -> EvictResult:
        """Evict in upstream's order, with the adapters that the strategy holds locked until it gives them up."""
        sizes = {content_hash: len(adapter.slots) for content_hash, adapter in self._resident.items()}
        kv_slots = self.evictable_size() + self.protected_size() - sum(sizes.values())
        held = [self._resident[content_hash].node for content_hash in self.strategy.held(sizes, kv_slots)]
        for node in held:
            self.tree_core.inc_full_pin(node)
        given_up = 0
        try:
            result = evict(params)
            while given_up < len(held) and result.num_tokens_evicted < params.num_tokens:
                self.tree_core.dec_full_pin(held[given_up])
                given_up += 1
                # Nothing but the adapter just given up is left to evict.
                result.num_tokens_evicted += evict(params).num_tokens_evicted
        finally:
            for node in held[given_up:]:
                self.tree_core.dec_full_pin(node)
            evicted = self._forget_evicted()
        self.decisions.record(
            "evict", asked=params.num_tokens, evicted=result.num_tokens_evicted, held=len(held), adapters=evicted
        )
        return result

    def _forget_evicted(self) -> list[str]:
        """Content hashes of adapters that the tree no longer has."""
        evicted = [content_hash for content_hash, adapter in self._resident.items() if self._is_gone(adapter.node)]
        for content_hash in evicted:
            del self._resident[content_hash]
            self.on_evicted(content_hash)
        return evicted

    def _is_gone(self, node: int) -> bool:
        try:
            return self.tree_core.is_full_device_evicted(node)
        except KeyError:
            return True

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        lora_id, own_extra = self._split(params.key.extra_key)
        if lora_id is None:
            return super().match_prefix(params)
        prefix = self._prefixes[lora_id]
        key = self._behind(prefix, params.key, own_extra)
        result = super().match_prefix(dataclasses.replace(params, key=key))
        if len(result.device_indices) < prefix.slots:
            return zero_match_result(self, result)
        return result._replace(
            device_indices=result.device_indices[prefix.slots :],
            full_kv_hit_length=max(result.full_kv_hit_length - prefix.slots, 0),
        )

    def insert(self, params: InsertParams) -> InsertResult:
        lora_id, own_extra = self._split(params.key.extra_key)
        result = super().insert(params) if lora_id is None else self._insert_behind(lora_id, own_extra, params)
        content_hash = None if lora_id is None else self._prefixes[lora_id].content_hash
        self._owners.wrote(content_hash, params.value[params.prev_prefix_len :])
        if self._events is not None:
            namespace = Namespace(content_hash, own_extra or None, params.key.cache_salt)
            known = min(params.prev_prefix_len, result.prefix_len)
            tokens = params.key.raw_token_ids()
            self._events.stored(namespace, tokens, params.value, known, result.prefix_len, params.session_id)
        return result

    def _insert_behind(self, lora_id: str, own_extra: str | None, params: InsertParams) -> InsertResult:
        prefix, slots = self._prefixes[lora_id], self.slots_of(lora_id)
        if slots is None:
            raise RuntimeError(f"KV of adapter {lora_id} without its weights: its prefix was not locked")
        result = super().insert(
            dataclasses.replace(
                params,
                key=self._behind(prefix, params.key, own_extra),
                value=torch.cat([slots, params.value]),
                prev_prefix_len=params.prev_prefix_len + prefix.slots,
            )
        )
        return dataclasses.replace(
            result, prefix_len=result.prefix_len - prefix.slots, total_len=result.total_len - prefix.slots
        )

    def take_events(self) -> list[Any]:
        """KV events since the last call; none where they are off."""
        return [] if self._events is None else self._events.take()

    def _drain_device_frees(self, device_frees: dict[ComponentType, list[torch.Tensor]]) -> None:
        if self._events is not None:
            for slots in device_frees.get(ComponentType.FULL, ()):
                self._events.removed(slots)
        super()._drain_device_frees(device_frees)

    def _split(self, extra_key: str | None) -> tuple[str | None, str | None]:
        """The adapter and the user's own part of an extra key (upstream appends the adapter's id to it)."""
        lora_id = (extra_key or "")[-LORA_ID_LENGTH:]
        if lora_id not in self._prefixes:
            return None, extra_key
        return lora_id, (extra_key or "")[:-LORA_ID_LENGTH]

    def _behind(self, prefix: AdapterPrefix, key: RadixKey, own_extra: str | None) -> RadixKey:
        tokens = array("q", key.raw_token_ids())
        return RadixKey(prefix.tokens + salted_tokens(tokens, own_extra, key.cache_salt))
