"""Brings adapters into an arena of their own, beside the KV cache."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from sglang_blocklora.memory.accounting import IntegrityError, SlotCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import EvictionStrategy
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter, Resident
from sglang_blocklora.memory.pool import AdapterPool, Arena
from sglang_blocklora.memory.transfer import Transfer


class FreeListArena(Arena, Protocol):
    """An arena that also keeps account of its slots."""

    @property
    def total_slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    def allocate(self, count: int) -> torch.Tensor | None: ...
    def on_device(self, slots: torch.Tensor) -> torch.Tensor: ...
    def free(self, slots: torch.Tensor) -> None: ...


class StaticPool(AdapterPool):
    """Loaded adapters over an arena that holds nothing else."""

    arena: FreeListArena

    def __init__(
        self,
        arena: FreeListArena,
        max_adapters_per_batch: int,
        images: ImageStore,
        decisions: DecisionLog,
        strategy: EvictionStrategy,
        transfer: Transfer | None = None,
    ) -> None:
        super().__init__(max_adapters_per_batch, images, decisions, transfer)
        self.arena = arena
        self._transfer.bind(arena)
        self.resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._slots: dict[str, torch.Tensor] = {}  # of those, on the host
        self._strategy = strategy

    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        total, pinned_slots = self.arena.total_slots, self.pinned_slots
        if slots > total:
            return f"it needs {slots} slots and the arena has {total}"
        if pinned and pinned_slots + slots > total // 2:
            return (
                f"pinned adapters would take {pinned_slots + slots} of the arena's {total} slots, more than half of it"
            )
        if not pinned and slots > total - pinned_slots:
            return f"it needs {slots} slots and pinned adapters leave {total - pinned_slots}"
        return None

    def remove(self, key: str) -> None:
        super().remove(key)
        if key in self.resident:
            self._put_out(key)

    def kv_owner(self, key: str) -> str:
        """The contents' hash: SGLang's tree, and what it stores behind it, may outlive the adapter, name and path."""
        return self.loaded[key].content_hash

    def is_resident(self, key: str) -> bool:
        return key in self.resident

    def set_pinned(self, key: str, pinned: bool) -> str | None:
        reason = super().set_pinned(key, pinned)
        if key in self.resident:
            self.resident[key] = dataclasses.replace(self.resident[key], adapter=self.loaded[key])
        return reason

    def begin_step(self, keys: Iterable[str]) -> None:
        """As in the base class; keys that are not loaded are passed over, since an aborted request may outlive its
        adapter by one step."""
        running = sorted(key for key in set(keys) if key in self.loaded)
        for key in running:
            if key not in self.resident:
                raise RuntimeError(f"adapter {self.loaded[key].name!r} runs but is not resident")
            self.resident.move_to_end(key)
        self._transfer.join(running)

    def slots_held_for(self, key: str | None) -> int:
        """None: adapters take no slots of KV here."""
        return 0

    def arrived(self, key: str | None, prompt: object) -> None:
        """As in the base class; no KV competes for this arena's slots, so how much is cached does not count."""
        self._strategy.arrived(self.loaded[key].content_hash if key in self.loaded else None, lambda: 0)

    def slot_counts(self) -> SlotCounts:
        adapters: Counter[str] = Counter()
        for resident in self.resident.values():
            adapters[resident.adapter.content_hash] += len(resident.slots)
        return SlotCounts(total=self.arena.total_slots, free=self.arena.free_slots, in_use=0, adapters=adapters, kv={})

    def check_integrity(self, in_use: int = 0) -> None:
        """As in the base class; requests have no slots in this arena."""
        owned = [slot for slots in self._slots.values() for slot in slots.tolist()]
        if len(owned) != len(set(owned)):
            raise IntegrityError("two adapters own one slot")
        if len(owned) + self.arena.free_slots != self.arena.total_slots:
            raise IntegrityError(f"slots leaked: {self.slot_counts()}")
        if not set(self.resident) <= set(self.loaded) or self.resident.keys() != self._slots.keys():
            raise IntegrityError("an unloaded adapter is resident")

    def _fit_together(self, keys: Sequence[str]) -> bool:
        together = {*keys, *(key for key, adapter in self.loaded.items() if adapter.pinned)}
        return sum(self.loaded[key].slots for key in together) <= self.arena.total_slots

    def _bring_in(self, key: str, keep: Sequence[str]) -> bool:
        if key in self.resident:
            return True
        adapter = self.loaded[key]
        image = self.images.get(key, adapter)
        if image is None:
            return False
        with self.load_counts.measure(key, image.nbytes):
            self._slots[key] = self._allocate(adapter, keep)
            slots = self.arena.on_device(self._slots[key])
            self.decisions.record("load", adapter=adapter.name, slots=len(slots))
            self._transfer.copy(key, slots, image)
            self.resident[key] = Resident(adapter, slots)
        return True

    def _allocate(self, adapter: LoadedAdapter, keep: Sequence[str]) -> torch.Tensor:
        while (slots := self.arena.allocate(adapter.slots)) is None:
            victim = self._victim(keep)
            if victim is None:
                raise RuntimeError(f"no room for adapter {adapter.name!r} ({adapter.slots} slots) in this batch")
            self.decisions.record("evict", adapter=self.resident[victim].adapter.name)
            self._put_out(victim)
            self.load_counts.evicted(victim)
        return slots

    def _put_out(self, key: str) -> None:
        """Free a resident adapter's slots."""
        del self.resident[key]
        self.arena.free(self._slots.pop(key))
        self._transfer.forget(key)

    def _victim(self, keep: Sequence[str]) -> str | None:
        """Who gives way: the least recently used that the strategy does not protect, else its first to give up."""
        sizes = {resident.adapter.content_hash: len(resident.slots) for resident in self.resident.values()}
        ranks = {content_hash: place for place, content_hash in enumerate(self._strategy.protected(sizes, 0), start=1)}
        idle = [key for key, one in self.resident.items() if key not in keep and not one.adapter.pinned]
        return min(idle, key=lambda key: ranks.get(self.resident[key].adapter.content_hash, 0), default=None)
