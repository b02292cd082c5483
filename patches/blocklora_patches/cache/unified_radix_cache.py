"""Keeps adapters in the radix tree, as prefixes of their KV (``mem_cache/unified_radix_cache.py``).

An adapter that needs S slots is inserted as S marks whose values are the slots that hold its weights. The key of every
request with that adapter is the marks followed by its own tokens. So SGLang's locks keep an adapter while a request
runs, leaves-first eviction drops KV before its adapter, and all of upstream's accounting counts it.

Each adapter has a namespace of the tree to itself, in which no key without its marks is ever looked up or inserted:
``sglang_blocklora/memory/prefix.py``. A request whose key could not be told apart is served, and nothing of it cached.
An activated adapter is in its namespace too, but the KV of its requests is the base model's up to the invocation, and
lies where that lies: ``places.py``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    zero_match_result,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang_blocklora.memory.accounting import IntegrityError, SlotCounts, SlotOwners
from sglang_blocklora.memory.changes import Changes
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.entries import Entries, Entry
from sglang_blocklora.memory.eviction import LRU, EvictionStrategy
from sglang_blocklora.memory.prefix import are_token_ids

from blocklora_patches.cache.events import KVEvents, Namespace
from blocklora_patches.cache.places import NOTHING, ActivatedNode, Place, find_place
from blocklora_patches.releases.current import release

logger = logging.getLogger(__name__)


class AdapterPrefixCache(release.CacheBase):
    """The default radix cache, in which an adapter is the first part of every key under it.

    Keys without an adapter are upstream's own. ``match_prefix`` never loads anything: an adapter that is not resident
    matches nothing. Loading is ``reserve``, writing the weights to the slots it gives, and ``publish``.
    """

    def __init__(self, params: CacheInitParams) -> None:
        self.decisions = DecisionLog(None, 0)  # replaced, as is the strategy, when bound to a server's adapters
        self.strategy: EvictionStrategy = LRU()
        self.on_evicted: Callable[[str], None] = lambda content_hash: None
        self._entries = Entries()
        self._changes = Changes()
        self._events = KVEvents(params.page_size) if params.enable_kv_cache_events else None
        allocator = params.token_to_kv_pool_allocator
        self._owners = SlotOwners(allocator.size + params.page_size, allocator.device)
        super().__init__(dataclasses.replace(params, enable_kv_cache_events=False))

    def reset(self) -> None:
        """Everything is dropped, adapters too, pinned ones among them; upstream calls it to flush an idle server."""
        for entry in list(self._entries.resident.values()):
            self._went(entry)
        self._changes.removed()
        super().reset()
        known = set(self._entries.activated)
        self._entries.forget_numbers()
        for content_hash in known.difference(self._entries.activated):
            self._owners.forget(content_hash)
        if self._events is not None:
            self._events.cleared()

    def know(self, lora_id: str, content_hash: str, slots: int, activated: bool = False) -> None:
        """Tell what requests with ``lora_id`` use, until ``forget``; whether it is an activated adapter."""
        self._entries.know(lora_id, content_hash, self.slots_needed(slots), activated)

    def forget(self, lora_id: str) -> None:
        """No request with ``lora_id`` runs any more or comes again; what is cached of its contents stays."""
        self.unpin_adapter(lora_id)
        self._entries.forget(lora_id)

    def slots_needed(self, slots: int) -> int:
        """``slots`` rounded up to whole pages."""
        return -(-slots // self.page_size) * self.page_size

    def slots_of(self, lora_id: str) -> torch.Tensor | None:
        """Slots (int64, on the allocator's device) of an adapter that is resident, else None. Asking is not a use."""
        return self._entries[lora_id].slots

    def arrived(self, lora_id: str | None, key: RadixKey) -> None:
        """Tell the strategy of a request that came, once each. ``key`` is as a match would have it."""
        entry = self._entries.get(lora_id)
        self.strategy.arrived(None if entry is None else entry.content_hash, lambda: self.cached_tokens(key))

    def cached_tokens(self, key: RadixKey) -> int:
        """How many tokens of ``key`` a match would find. Unlike a match it counts as no use."""
        place = self._place(key)
        if place is None:
            return 0
        return max(self.tree_core.match_full_device_prefix(place.key)[0] - place.weights, 0)

    @property
    def changes(self) -> int:
        """The number of the last change of what is cached."""
        return self._changes.now

    def may_match_otherwise(self, lora_id: str | None, found_tokens: int, since: int) -> bool:
        """Whether a request could match another number of tokens now than at the change ``since``."""
        entry = self._entries.get(lora_id)
        owners = (
            [None] if entry is None else [entry.content_hash] if entry.number is None else [None, entry.content_hash]
        )
        return any(self._changes.concern(owner, found_tokens, since) for owner in owners)

    def can_admit(self, lora_id: str | None) -> bool:
        """Whether a request would find its adapter resident; the base model's (None) needs none."""
        entry = self._entries.get(lora_id)
        return entry is None or entry.slots is not None

    def slots_held_for(self, lora_id: str | None) -> int:
        """Slots that cannot be freed while a request of ``lora_id`` runs: its adapter's and those of pinned ones."""
        entry = self._entries.get(lora_id)
        return self._entries.pinned_slots + (len(entry.marks) if entry is not None and not entry.pins else 0)

    def has_room(self, lora_id: str) -> bool:
        """Whether an adapter's slots are free, or are once everything not in use is evicted."""
        shortfall = len(self._entries[lora_id].marks) - self.token_to_kv_pool_allocator.available_size()
        return shortfall <= self.evictable_size()

    def reserve(self, lora_id: str) -> torch.Tensor | None:
        """Take free slots for an adapter (int64), evicting what is not in use; None where that is not enough.

        The caller writes the weights to them and then calls ``publish`` or ``give_back``.
        """
        allocator, needed = self.token_to_kv_pool_allocator, len(self._entries[lora_id].marks)
        if not self.has_room(lora_id):
            return None
        if (shortfall := needed - allocator.available_size()) > 0:
            self.evict(EvictParams(num_tokens=shortfall))
        slots = allocator.alloc(needed)
        # A copy: the allocator may give a view of its whole free list, which would then live as long as the adapter.
        return None if slots is None else slots.to(torch.int64, copy=True)

    def give_back(self, slots: torch.Tensor) -> None:
        """Free slots that ``reserve`` gave and ``publish`` did not take."""
        self.token_to_kv_pool_allocator.free(slots)

    def publish(self, lora_id: str, slots: torch.Tensor) -> None:
        """Insert an adapter whose weights lie in ``slots``; from now on the tree owns them.

        ``IntegrityError``, and nothing is inserted, where the tree has anything of the adapter already.
        """
        entry = self._entries[lora_id]
        key = RadixKey(entry.marks, entry.content_hash)
        found = self.tree_core.match_full_device_prefix(key)[0]
        if entry.slots is not None or found or len(slots) != len(key):
            raise IntegrityError(
                f"adapter {lora_id} cannot be published in {len(slots)} slots: it has {len(key)}, {found} of which are "
                f"in the tree already, and is {'not ' if entry.slots is None else ''}resident"
            )
        inserted = super().insert(InsertParams(key=key, value=slots))
        self._owners.wrote_weights(entry.content_hash, slots)
        self._entries.came(entry, inserted.last_device_node, slots)

    def slot_counts(self) -> SlotCounts:
        """Who has the pool's slots; walks the tree and waits for the device, so it is for reports and checks."""
        allocator, cached = self.token_to_kv_pool_allocator, self.all_values_flatten()
        weights, kv = self._owners.count(cached)
        total, free = allocator.size, allocator.available_size()
        return SlotCounts(
            total=total,
            free=free,
            in_use=total - free - len(cached),
            adapters=weights,
            kv=kv,
            activated=self._entries.activated,
        )

    def check_slots(self, in_use: int) -> None:
        """``IntegrityError`` unless every slot has exactly one owner, ``in_use`` of them requests outside the tree."""
        counts, cached = self.slot_counts(), self.all_values_flatten()
        resident = self._entries.resident
        wrong = {
            "a slot is in the tree twice": len(cached) != len(cached.unique()),
            f"slots leaked or were freed twice, {in_use} expected in use": counts.in_use != in_use,
            "the tree's sizes are wrong": len(cached) != self.evictable_size() + self.protected_size(),
            "KV without its adapter": counts.invalid_kv != 0,
            "weights of adapters that are not resident, or not all of them": counts.adapters
            != {content_hash: len(entry.marks) for content_hash, entry in resident.items()},
            "the tree lost slots of a resident adapter": any(
                entry.slots is None or not torch.isin(entry.slots, cached).all() for entry in resident.values()
            ),
            "pinned slots are miscounted": self._entries.pinned_slots
            != sum(len(entry.marks) for entry in resident.values() if entry.pins),
        }
        if any(wrong.values()):
            raise IntegrityError(f"{'; '.join(what for what, is_so in wrong.items() if is_so)}: {counts}")

    def pin_adapter(self, lora_id: str) -> None:
        """Lock a resident adapter until ``unpin_adapter`` or a flush."""
        if (node := self._entries.pin(lora_id)) is not None:
            self.tree_core.inc_full_pin(node)

    def unpin_adapter(self, lora_id: str) -> None:
        """Undo ``pin_adapter``; nothing where the adapter is not pinned."""
        if (node := self._entries.unpin(lora_id)) is not None:
            self.tree_core.dec_full_pin(node)

    @contextmanager
    def keeping(self, lora_id: str | None) -> Iterator[None]:
        """Meanwhile the adapter is not evicted, where it is resident."""
        entry = self._entries.get(lora_id)
        node = None if entry is None else entry.node
        if node is None:
            yield
            return
        self.tree_core.inc_full_pin(node)
        try:
            yield
        finally:
            self.tree_core.dec_full_pin(node)

    def evict(self, params: EvictParams) -> EvictResult:
        return self.evict_by_strategy(super().evict, params)

    def evict_by_strategy(self, evict: Callable[[EvictParams], EvictResult], params: EvictParams) -> EvictResult:
        """Evict in upstream's order, with the adapters that the strategy protects locked until it gives them up."""
        resident = self._entries.resident
        sizes = {content_hash: len(entry.marks) for content_hash, entry in resident.items()}
        kv_slots = self.evictable_size() + self.protected_size() - sum(sizes.values())
        protected = [resident[content_hash].node for content_hash in self.strategy.protected(sizes, kv_slots)]
        for node in protected:
            self.tree_core.inc_full_pin(node)
        given_up = 0
        try:
            result = evict(params)
            while given_up < len(protected) and result.num_tokens_evicted < params.num_tokens:
                self.tree_core.dec_full_pin(protected[given_up])
                given_up += 1
                # Nothing but the adapter just given up is left to evict.
                result.num_tokens_evicted += evict(params).num_tokens_evicted
        finally:
            for node in protected[given_up:]:
                self.tree_core.dec_full_pin(node)
            self._changes.removed()
            evicted = self._forget_evicted()
        self.decisions.record(
            "evict",
            asked=params.num_tokens,
            evicted=result.num_tokens_evicted,
            protected=len(protected),
            adapters=evicted,
        )
        return result

    def _forget_evicted(self) -> list[str]:
        """Content hashes of adapters that the tree no longer has."""
        evicted = [entry for entry in self._entries.resident.values() if self._is_gone(entry.node)]
        for entry in evicted:
            self._went(entry)
        return [entry.content_hash for entry in evicted]

    def _went(self, entry: Entry) -> None:
        if entry.number is None:  # else its KV may be there, and is found again
            self._owners.forget(entry.content_hash)
        self._entries.went(entry)
        self.on_evicted(entry.content_hash)

    def _is_gone(self, node: int | None) -> bool:
        try:
            return node is None or self.tree_core.is_full_device_evicted(node)
        except KeyError:
            return True

    def match_behind(self, match: Callable[[MatchPrefixParams], MatchResult], params: MatchPrefixParams) -> MatchResult:
        """``match``, upstream's, of what lies behind the adapter that a request's key names."""
        place = self._place(params.key)
        if place is None:
            return match(dataclasses.replace(params, key=NOTHING))
        if place.entry is None:
            return match(dataclasses.replace(params, key=place.key))
        if place.activated_from is not None:
            if place.entry.node is not None:  # the weights are used too, which the order of eviction goes by
                match(MatchPrefixParams(key=RadixKey(place.entry.marks, place.entry.content_hash)))
            result = match(dataclasses.replace(params, key=place.key))
            return result._replace(last_device_node=place.handle(result.last_device_node))
        result = match(dataclasses.replace(params, key=place.key))
        if release.matched_tokens(result) < place.weights:
            return zero_match_result(self, result)
        return release.without_weights(result, place.weights)

    def tree_key(self, key: RadixKey) -> RadixKey:
        """The key of the tree for a request's key; an empty one where the tree has nothing of it."""
        place = self._place(key)
        return NOTHING if place is None else place.key

    def holds_weights(self, node: int) -> bool:
        """Whether a node of the tree is a resident adapter's weights."""
        return node in self._entries.nodes

    def inc_lock_ref(self, node_id: int, *args: Any, **kwargs: Any) -> IncLockRefResult:
        if isinstance(node_id, ActivatedNode):
            self.tree_core.inc_full_pin(node_id.weights)
        return super().inc_lock_ref(node_id, *args, **kwargs)

    def dec_lock_ref(self, node_id: int, *args: Any, **kwargs: Any) -> DecLockRefResult:
        if isinstance(node_id, ActivatedNode):
            self.tree_core.dec_full_pin(node_id.weights)
        return super().dec_lock_ref(node_id, *args, **kwargs)

    def insert(self, params: InsertParams) -> InsertResult:
        place = self._place(params.key)
        if place is not None and place.weights and self._is_gone(place.entry.node):
            logger.error("KV of adapter contents %s without their weights is not kept", place.entry.content_hash)
            place = None
        if place is None or not are_token_ids(params.key.raw_token_ids()):
            # Upstream's word for an insert that kept nothing: the request keeps its slots and frees them in the end.
            return InsertResult(prefix_len=0, last_device_node=self.root_node_handle(), rotation_tail_declined=True)
        if place.weights:
            result = self._insert_behind(place.entry, place.key, params)
        else:
            result = super().insert(dataclasses.replace(params, key=place.key))
        if place.activated_from is not None:
            result = dataclasses.replace(result, last_device_node=place.handle(result.last_device_node))
        content_hash = None if place.entry is None else place.entry.content_hash
        behind = max(params.prev_prefix_len, place.activated_from or 0)
        self._owners.wrote_kv(None, params.value[params.prev_prefix_len : behind])
        self._owners.wrote_kv(content_hash, params.value[behind:])
        self._changes.added(content_hash)
        if place.activated_from is not None:
            self._changes.added(None)
        if self._events is not None:
            namespace = Namespace(content_hash, place.own_extra, params.key.cache_salt, place.activated_from)
            known = min(params.prev_prefix_len, result.prefix_len)
            tokens = params.key.raw_token_ids()
            self._events.stored(namespace, tokens, params.value, known, result.prefix_len, params.session_id)
        return result

    def _insert_behind(self, entry: Entry, key: RadixKey, params: InsertParams) -> InsertResult:
        """Insert a request's KV behind its adapter's weights.

        Ranges of ``key``, where S = slots of the adapter, k = tokens that the request has locked in the tree already
        (``prev_prefix_len``), p = tokens that the tree turns out to have (``prefix_len``, k <= p), n = tokens:

        | range          | whose slots are passed     | what becomes of them                                       |
        |----------------|----------------------------|------------------------------------------------------------|
        | [0, S)         | the adapter's, the tree's  | nothing                                                    |
        | [S, S + k)     | the tree's                 | nothing                                                    |
        | [S + k, S + p) | the request's              | freed by upstream: others have inserted these tokens       |
        | [S + p, S + n) | the request's              | the tree's from now on                                     |

        Upstream frees nothing before ``prev_prefix_len``: it is S + k, so that weights are never taken for duplicates.
        """
        weights = len(entry.marks)
        result = super().insert(
            dataclasses.replace(
                release.behind_weights(params, weights), key=key, value=torch.cat([entry.slots, params.value])
            )
        )
        return dataclasses.replace(result, prefix_len=result.prefix_len - weights, total_len=result.total_len - weights)

    def take_events(self) -> list[Any]:
        """KV events since the last call; none where they are off."""
        return [] if self._events is None else self._events.take()

    def _drain_device_frees(self, device_frees: dict[ComponentType, list[torch.Tensor]]) -> None:
        if self._events is not None:
            for slots in device_frees.get(ComponentType.FULL, ()):
                self._events.removed(slots)
        super()._drain_device_frees(device_frees)

    def _place(self, key: RadixKey) -> Place | None:
        return find_place(self._entries, key)
