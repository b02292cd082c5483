"""Loaded adapters of one TP rank: all in host memory, the ones in use also in the arena."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.accounting import SlotCounts
from sglang_blocklora.memory.load_counts import LoadCounts


class Arena(Protocol):
    """Where adapter rows live. ``planes[layer]`` is (K, V), each [slots, W]."""

    @property
    def planes(self) -> Sequence[Sequence[torch.Tensor]]: ...
    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None: ...


class FreeListArena(Arena, Protocol):
    """An arena that also keeps account of its slots."""

    @property
    def total_slots(self) -> int: ...
    @property
    def free_slots(self) -> int: ...
    def allocate(self, count: int) -> torch.Tensor | None: ...
    def free(self, slots: torch.Tensor) -> None: ...


@dataclass(frozen=True)
class LoadedAdapter:
    """``slots`` is the count that all TP ranks agreed on (the largest of their shards).

    content_hash  sha256 in hex of the adapter's files: what its cached KV belongs to
    """

    name: str
    path: str
    shard: AdapterShard
    slots: int
    pinned: bool
    content_hash: str


@dataclass(frozen=True)
class Resident:
    """An adapter in the arena: its physical rows, int64 [slots] on the host."""

    adapter: LoadedAdapter
    slots: torch.Tensor


class Pool(Protocol):
    """What holds the loaded adapters of one TP rank: ``AdapterPool`` or ``UnifiedPool``. Keys are ``lora_id``."""

    max_adapters_per_batch: int
    loaded: dict[str, LoadedAdapter]
    load_counts: LoadCounts

    @property
    def arena(self) -> Arena: ...
    @property
    def resident(self) -> Mapping[str, Resident]: ...
    def add(self, key: str, adapter: LoadedAdapter) -> None: ...
    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None: ...
    def remove(self, key: str) -> None: ...
    def is_resident(self, key: str) -> bool: ...
    def set_pinned(self, key: str, pinned: bool) -> str | None: ...
    def fits(self, keys: Iterable[str]) -> bool: ...
    def make_resident(self, keys: Iterable[str]) -> None: ...
    def slot_counts(self) -> SlotCounts: ...
    def check_integrity(self, in_use: int) -> None: ...


class AdapterPool:
    """Which adapters are loaded, and which of them are resident. Keys are SGLang's ``lora_id``.

    Every decision depends only on the order of calls and on agreed slot counts, so all TP ranks decide alike.
    """

    def __init__(self, arena: FreeListArena, max_adapters_per_batch: int) -> None:
        self.arena = arena
        self.max_adapters_per_batch = max_adapters_per_batch
        self.loaded: dict[str, LoadedAdapter] = {}
        self.resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self.load_counts = LoadCounts()

    def add(self, key: str, adapter: LoadedAdapter) -> None:
        """Take a checked adapter into host memory. The caller has asked ``reason_not_to_add``."""
        self.loaded[key] = adapter

    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        """Why an adapter of ``slots`` slots cannot be served here, or None."""
        total = self.arena.total_slots
        pinned_slots = sum(adapter.slots for adapter in self.loaded.values() if adapter.pinned)
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
        """Forget an adapter and free its slots. ``KeyError`` if it is not loaded."""
        del self.loaded[key]
        self.load_counts.forget(key)
        resident = self.resident.pop(key, None)
        if resident is not None:
            self.arena.free(resident.slots)

    def is_resident(self, key: str) -> bool:
        """Whether the adapter is in the arena."""
        return key in self.resident

    def set_pinned(self, key: str, pinned: bool) -> str | None:
        """Keep an adapter in the arena once it is there, or stop to. Why not, or None. ``KeyError`` if not loaded."""
        adapter = self.loaded[key]
        if pinned and not adapter.pinned and (reason := self.reason_not_to_add(adapter.slots, True)):
            return reason
        self.loaded[key] = dataclasses.replace(adapter, pinned=pinned)
        if key in self.resident:
            self.resident[key] = Resident(self.loaded[key], self.resident[key].slots)
        return None

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether the adapters of a batch fit the batch limit and, with all pinned ones, the arena."""
        wanted = {key for key in keys if key in self.loaded}
        if len(wanted) > self.max_adapters_per_batch:
            return False
        wanted |= {key for key, adapter in self.loaded.items() if adapter.pinned}
        return sum(self.loaded[key].slots for key in wanted) <= self.arena.total_slots

    def make_resident(self, keys: Iterable[str]) -> None:
        """Bring the adapters of a batch into the arena, evicting the least recently used others.

        Keys that are not loaded are passed over (an aborted request may outlive its adapter by one step).
        ``RuntimeError`` if they do not fit together; ``fits`` says so beforehand.
        """
        wanted = sorted(key for key in set(keys) if key in self.loaded)
        for key in wanted:
            if key in self.resident:
                self.resident.move_to_end(key)
        for key in wanted:
            if key not in self.resident:
                with self.load_counts.measure(key):
                    self.resident[key] = self._load(self.loaded[key], wanted)

    def _load(self, adapter: LoadedAdapter, keep: list[str]) -> Resident:
        while (slots := self.arena.allocate(adapter.slots)) is None:
            victim = next((k for k, r in self.resident.items() if k not in keep and not r.adapter.pinned), None)
            if victim is None:
                raise RuntimeError(f"no room for adapter {adapter.name!r} ({adapter.slots} slots) in this batch")
            self.arena.free(self.resident.pop(victim).slots)
            self.load_counts.evicted(victim)
        self.arena.write(slots, adapter.shard.image)
        return Resident(adapter, slots)

    def slot_counts(self) -> SlotCounts:
        """Who has the arena's slots; no KV lives here and nothing else uses it."""
        adapters: Counter[str] = Counter()
        for resident in self.resident.values():
            adapters[resident.adapter.content_hash] += len(resident.slots)
        return SlotCounts(self.arena.total_slots, self.arena.free_slots, 0, adapters, {})

    def check_integrity(self, in_use: int = 0) -> None:
        """``AssertionError`` unless every slot has exactly one owner and only loaded adapters are resident.

        ``in_use`` counts slots of requests, of which this arena has none.
        """
        owned = [slot for resident in self.resident.values() for slot in resident.slots.tolist()]
        assert len(owned) == len(set(owned)), "two adapters own one slot"
        assert len(owned) + self.arena.free_slots == self.arena.total_slots, "a slot leaked"
        assert set(self.resident) <= set(self.loaded), "an unloaded adapter is resident"
