"""Adapters in the KV cache's own slots: which are resident is what the radix tree holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from sglang_blocklora.memory.accounting import IntegrityError, SlotCounts
from sglang_blocklora.memory.counts import LoadCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter, Resident
from sglang_blocklora.memory.transfer import Transfer

# A request may run this many steps after its adapter was unloaded: an abort frees the name before the batch ends.
LINGER_STEPS = 8
# Of so many at most: while nothing runs no steps pass, and adapters may come and go all the same.
LINGER_ADAPTERS = 64


class PrefixCache(Protocol):
    """What the pool needs of the radix cache (``AdapterPrefixCache``).

    on_evicted  called with the content hash of each adapter that was put out
    """

    on_evicted: Callable[[str], None]

    def know(self, lora_id: str, content_hash: str, slots: int) -> None: ...
    def forget(self, lora_id: str) -> None: ...
    def slots_needed(self, slots: int) -> int: ...
    def slots_of(self, lora_id: str) -> torch.Tensor | None: ...
    def has_room(self, lora_id: str, spare: int = 0) -> bool: ...
    def reserve(self, lora_id: str) -> torch.Tensor | None: ...
    def give_back(self, slots: torch.Tensor) -> None: ...
    def publish(self, lora_id: str, slots: torch.Tensor) -> None: ...
    def pin_adapter(self, lora_id: str) -> None: ...
    def unpin_adapter(self, lora_id: str) -> None: ...
    def slot_counts(self) -> SlotCounts: ...
    def check_slots(self, in_use: int) -> None: ...


class KVArena:
    """SGLang's K and V buffers seen as rows: ``planes[layer]`` is (K, V), each [slots, W]. Owns nothing."""

    def __init__(self, k_buffers: Sequence[torch.Tensor], v_buffers: Sequence[torch.Tensor]) -> None:
        """``k_buffers`` and ``v_buffers`` are [slots, KV heads, head dimension] per layer, contiguous."""
        self.planes = [
            (k.view(k.shape[0], -1), v.view(v.shape[0], -1)) for k, v in zip(k_buffers, v_buffers, strict=True)
        ]

    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None:
        """Copy a packed image [layers, 2, S, W] into ``slots[:S]``; ordered with the current stream's work."""
        rows = slots[: image.shape[2]]
        for planes, layer in zip(self.planes, image.to(rows.device), strict=True):
            for plane, part in zip(planes, layer, strict=True):
                plane.index_copy_(0, rows, part)


class UnifiedPool:
    """Loaded adapters of one TP rank, resident ones in the KV pool. Keys are SGLang's ``lora_id``.

    ``bind`` comes once the KV pool and the tree exist. Decisions depend on the tree and the order of calls only.
    """

    def __init__(
        self,
        max_adapters_per_batch: int,
        images: ImageStore,
        decisions: DecisionLog,
        transfer: Transfer | None = None,
    ) -> None:
        self.images = images
        self._transfer = transfer or Transfer()
        self.decisions = decisions
        self.max_adapters_per_batch = max_adapters_per_batch
        self.loaded: dict[str, LoadedAdapter] = {}
        self.resident: dict[str, Resident] = {}
        self._device_slots: dict[str, torch.Tensor] = {}
        self._lingering: dict[str, tuple[LoadedAdapter, int]] = {}
        self._steps = 0
        self._cache: PrefixCache | None = None
        self.total_slots: int | None = None

    def bind_arena(self, arena: KVArena, total_slots: int) -> None:
        """Set the KV buffers and the number of slots that requests and adapters share."""
        self.arena = arena
        self.total_slots = total_slots
        for adapter in self.loaded.values():
            reason = self.reason_not_to_add(adapter.slots, adapter.pinned)
            if reason is not None:
                raise ValueError(
                    f"adapter {adapter.name!r}: {reason}. Use --adapter-memory static or a larger KV pool."
                )

    def bind_cache(self, cache: PrefixCache) -> None:
        """Set the tree; adapters that are loaded already become known to it."""
        self._cache = cache
        cache.on_evicted = self._count_eviction
        for key, adapter in self.loaded.items():
            cache.know(key, adapter.content_hash, adapter.slots)

    @property
    def cache(self) -> PrefixCache:
        """The tree. ``AssertionError`` before ``bind_cache``."""
        assert self._cache is not None, "adapters cannot be resident before the radix cache exists"
        return self._cache

    @property
    def load_counts(self) -> LoadCounts:
        return self.images.load_counts

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        """Take a checked adapter. The caller has asked ``reason_not_to_add``."""
        self.loaded[key] = adapter
        self.images.add(key, adapter, image)
        if self._cache is not None:
            self._cache.know(key, adapter.content_hash, adapter.slots)

    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        """Why an adapter of ``slots`` slots cannot be served here, or None. All fit before the pool's size is known."""
        if self.total_slots is None:
            return None
        taken = slots + (sum(adapter.slots for adapter in self.loaded.values() if adapter.pinned) if pinned else 0)
        if taken > self.total_slots // 2:
            what = "pinned adapters would take" if pinned else "it needs"
            return f"{what} {taken} of the KV pool's {self.total_slots} slots, more than half of it"
        return None

    def remove(self, key: str) -> None:
        """Forget an adapter's name. What is cached under its contents stays until it is evicted."""
        adapter = self.loaded.pop(key)
        self.decisions.record("unload", adapter=adapter.name)
        self._lingering[key] = (adapter, self._steps)
        self.images.remove(key)
        self.cache.unpin_adapter(key)
        if len(self._lingering) > LINGER_ADAPTERS:
            self._forget(next(iter(self._lingering)))

    def is_resident(self, key: str) -> bool:
        """Whether the tree holds the adapter."""
        return self._cache is not None and self.cache.slots_of(key) is not None

    def set_pinned(self, key: str, pinned: bool) -> str | None:
        """Keep an adapter in the tree once it is there, or stop to. Why not, or None. ``KeyError`` if not loaded."""
        adapter = self.loaded[key]
        if pinned and not adapter.pinned and (reason := self.reason_not_to_add(adapter.slots, True)):
            return reason
        self.loaded[key] = dataclasses.replace(adapter, pinned=pinned)
        if not pinned:
            self.cache.unpin_adapter(key)
        elif self.is_resident(key):
            self.cache.pin_adapter(key)
        return None

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether the adapters of a batch fit; those that are not resident are loaded, evicting what is not in use.

        False too where an adapter cannot be read (``images.failures``); all TP ranks call this together.
        """
        wanted = sorted(key for key in set(keys) if key in self.loaded)
        return len(wanted) <= self.max_adapters_per_batch and all(self._load(key) for key in wanted)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Start to read from disk what host memory lacks of adapters wanted soon, most urgent first."""
        self.images.prefetch(
            [(key, self.loaded[key]) for key in keys if key in self.loaded and not self.is_resident(key)]
        )

    def make_resident(self, keys: Iterable[str]) -> None:
        """Look up the rows of a batch's adapters, which admission made resident and locks keep so.

        Keys that are not loaded are passed over, unless they were unloaded a few steps ago.
        ``RuntimeError`` for an adapter without rows: its requests would be answered wrongly.
        """
        self._steps += 1
        for key in [k for k, (_, step) in self._lingering.items() if self._steps - step > LINGER_STEPS]:
            self._forget(key)
        for key in sorted(set(keys)):
            adapter = self.loaded.get(key) or (self._lingering[key][0] if key in self._lingering else None)
            if adapter is None:
                continue
            slots = self.cache.slots_of(key)
            if slots is None:
                raise RuntimeError(f"adapter {adapter.name!r} runs but is not resident")
            if adapter.pinned:
                # Not when it is loaded: requests that were admitted before it in one pass count on those slots.
                self.cache.pin_adapter(key)
            self._note_rows(key, adapter, slots)
        self._transfer.join()

    def _forget(self, key: str) -> None:
        """Drop what was kept of an adapter for the last requests of its name."""
        del self._lingering[key]
        if key not in self.loaded:
            self.resident.pop(key, None)
            self._device_slots.pop(key, None)
            self.cache.forget(key)

    def slot_counts(self) -> SlotCounts:
        """Who has the KV pool's slots."""
        return self.cache.slot_counts()

    def check_integrity(self, in_use: int) -> None:
        """``IntegrityError`` unless every slot has exactly one owner, ``in_use`` of them requests outside the tree."""
        self.cache.check_slots(in_use)

    def _count_eviction(self, content_hash: str) -> None:
        """An adapter went; each name it has counts that."""
        for key, adapter in self.loaded.items():
            if adapter.content_hash == content_hash:
                self.load_counts.evicted(key)

    def load_ahead(self, key: str, keep: Iterable[str], spare: int) -> bool:
        """Bring an adapter into the tree before a batch needs it, where ``spare`` slots are left that can be had.

        What is locked there stays: ``keep`` adds nothing.
        """
        return self.cache.has_room(key, spare) and self._load(key)

    def _load(self, key: str) -> bool:
        adapter = self.loaded[key]
        if self.cache.slots_of(key) is None:
            # Slots are taken once the image is certain, so a failed read has nothing to give back.
            image = self.images.get(key, adapter) if self.cache.has_room(key) else None
            slots = self.cache.reserve(key) if image is not None else None
            if image is None or slots is None:
                return False
            self.decisions.record("load", adapter=adapter.name, slots=len(slots))
            try:
                with self.load_counts.measure(key, image.nbytes):
                    self._transfer.load(self.arena, slots, image)
                    self.cache.publish(key, slots)
            except IntegrityError as error:
                self.cache.give_back(slots)
                self.images.failures[key] = f"Adapter {adapter.name!r} cannot be served: {error}"
                return False
        self._note_rows(key, adapter, self.cache.slots_of(key))
        return True

    def _note_rows(self, key: str, adapter: LoadedAdapter, slots: torch.Tensor | None) -> None:
        """Copy slots to the host where the tree holds others than before: at admission, since the host waits for it."""
        if slots is not None and self._device_slots.get(key) is not slots:
            self._device_slots[key] = slots
            self.resident[key] = Resident(adapter, slots.cpu())
