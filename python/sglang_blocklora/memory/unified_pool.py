"""Brings adapters into the KV cache's own slots: resident is what the radix tree holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from sglang_blocklora.memory.accounting import IntegrityError, SlotCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter, Resident
from sglang_blocklora.memory.pool import AdapterPool
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

    def know(self, lora_id: str, content_hash: str, slots: int, activated: bool) -> None: ...
    def forget(self, lora_id: str) -> None: ...
    def slots_needed(self, slots: int) -> int: ...
    def slots_of(self, lora_id: str) -> torch.Tensor | None: ...
    def has_room(self, lora_id: str) -> bool: ...
    def reserve(self, lora_id: str) -> torch.Tensor | None: ...
    def give_back(self, slots: torch.Tensor) -> None: ...
    def publish(self, lora_id: str, slots: torch.Tensor) -> None: ...
    def pin_adapter(self, lora_id: str) -> None: ...
    def unpin_adapter(self, lora_id: str) -> None: ...
    def slots_held_for(self, lora_id: str | None) -> int: ...
    def arrived(self, lora_id: str | None, prompt: Any) -> None: ...
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


class UnifiedPool(AdapterPool):
    """Loaded adapters, resident ones in the KV pool.

    ``bind_arena`` comes once the KV pool exists, ``bind_cache`` once the tree does. Decisions depend on the tree and
    the order of calls only.
    """

    arena: KVArena

    def __init__(
        self,
        max_adapters_per_batch: int,
        images: ImageStore,
        decisions: DecisionLog,
        transfer: Transfer | None = None,
    ) -> None:
        super().__init__(max_adapters_per_batch, images, decisions, transfer)
        self.resident: dict[str, Resident] = {}
        self.total_slots: int | None = None
        self._lingering: dict[str, tuple[LoadedAdapter, int]] = {}
        self._steps = 0
        self._cache: PrefixCache | None = None

    def bind_arena(self, arena: KVArena, total_slots: int) -> None:
        """Set the KV buffers and the number of slots that requests and adapters share."""
        self.arena = arena
        self._transfer.bind(arena)
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
        cache.on_evicted = self._went
        for key, adapter in self.loaded.items():
            cache.know(key, adapter.content_hash, adapter.slots, bool(adapter.shard.invocation))

    @property
    def cache(self) -> PrefixCache:
        """The tree. ``RuntimeError`` before ``bind_cache``."""
        if self._cache is None:
            raise RuntimeError("adapters cannot be resident before the radix cache exists")
        return self._cache

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        super().add(key, adapter, image)
        if self._cache is not None:
            self._cache.know(key, adapter.content_hash, adapter.slots, bool(adapter.shard.invocation))

    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        """As in the base class; all fit before the KV pool's size is known."""
        if self.total_slots is None:
            return None
        taken = slots + (self.pinned_slots if pinned else 0)
        if taken > self.total_slots // 2:
            what = "pinned adapters would take" if pinned else "it needs"
            return f"{what} {taken} of the KV pool's {self.total_slots} slots, more than half of it"
        return None

    def remove(self, key: str) -> None:
        """As in the base class. What is cached under its contents stays until it is evicted."""
        self._lingering[key] = (self.loaded[key], self._steps)
        super().remove(key)
        self.cache.unpin_adapter(key)
        if len(self._lingering) > LINGER_ADAPTERS:
            self._forget(next(iter(self._lingering)))

    def kv_owner(self, key: str) -> str:
        """Itself: the cache knows its contents."""
        return key

    def is_resident(self, key: str) -> bool:
        return self._cache is not None and self.cache.slots_of(key) is not None

    def set_pinned(self, key: str, pinned: bool) -> str | None:
        reason = super().set_pinned(key, pinned)
        if reason is None and not pinned:
            self.cache.unpin_adapter(key)
        elif reason is None and self.is_resident(key):
            self.cache.pin_adapter(key)
        return reason

    def begin_step(self, keys: Iterable[str]) -> None:
        """As in the base class: looks up the rows of adapters that admission brought in and locks keep there.

        Keys that are not loaded are passed over, unless they were unloaded a few steps ago.
        """
        self._steps += 1
        for key in [k for k, (_, step) in self._lingering.items() if self._steps - step > LINGER_STEPS]:
            self._forget(key)
        contents = []
        for key in sorted(set(keys)):
            adapter = self.loaded.get(key) or (self._lingering[key][0] if key in self._lingering else None)
            if adapter is None:
                continue
            slots = self.cache.slots_of(key)
            if slots is None:
                raise RuntimeError(f"adapter {adapter.name!r} runs but is not resident")
            if adapter.pinned:
                # Not when it is brought in: requests that were admitted before it in one pass count on those slots.
                self.cache.pin_adapter(key)
            self._note_rows(key, adapter, slots)
            contents.append(adapter.content_hash)
        self._transfer.join(contents)

    def slots_held_for(self, key: str | None) -> int:
        """As in the base class: its adapter's slots and those of pinned ones."""
        return self.cache.slots_held_for(key)

    def arrived(self, key: str | None, prompt: object) -> None:
        self.cache.arrived(key, prompt)

    def slot_counts(self) -> SlotCounts:
        return self.cache.slot_counts()

    def check_integrity(self, in_use: int) -> None:
        self.cache.check_slots(in_use)

    def _forget(self, key: str) -> None:
        """Drop what was kept of an adapter for the last requests of its name."""
        del self._lingering[key]
        if key not in self.loaded:
            self.resident.pop(key, None)
            self.cache.forget(key)

    def _went(self, content_hash: str) -> None:
        """An adapter was evicted: its slots are free, and each name it has counts that."""
        self._transfer.forget(content_hash)
        for key, adapter in self.loaded.items():
            if adapter.content_hash == content_hash:
                self.resident.pop(key, None)
                self.load_counts.evicted(key)

    def _fit_together(self, keys: Sequence[str]) -> bool:
        """As in the base class: only the tree knows, adapter by adapter."""
        return True

    def _bring_in(self, key: str, keep: Sequence[str]) -> bool:
        """As in the base class; locks keep what must stay, so ``keep`` adds nothing."""
        adapter = self.loaded[key]
        if self.cache.slots_of(key) is None:
            # Slots are taken once the image is at hand, so a read has nothing to give back.
            image = self.images.get(key, adapter) if self.cache.has_room(key) else None
            slots = self.cache.reserve(key) if image is not None else None
            if image is None or slots is None:
                return False
            self.decisions.record("load", adapter=adapter.name, slots=len(slots))
            try:
                with self.load_counts.measure(key, image.nbytes):
                    self._transfer.copy(adapter.content_hash, slots, image)
                    self.cache.publish(key, slots)
            except IntegrityError as error:
                self._transfer.forget(adapter.content_hash)
                self.cache.give_back(slots)
                self.images.failures[key] = f"Adapter {adapter.name!r} cannot be served: {error}"
                return False
        self._note_rows(key, adapter, self.cache.slots_of(key))
        return True

    def _note_rows(self, key: str, adapter: LoadedAdapter, slots: torch.Tensor | None) -> None:
        """Note the slots where the tree holds others than before. They stay on the device: nobody waits for them."""
        if slots is not None and (key not in self.resident or self.resident[key].slots is not slots):
            self.resident[key] = Resident(adapter, slots)
