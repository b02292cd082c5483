"""Loaded adapters of one TP rank, the ones in use in an arena of their own."""

from __future__ import annotations

import dataclasses
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from sglang_blocklora.memory.accounting import IntegrityError, SlotCounts
from sglang_blocklora.memory.counts import LoadCounts
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter, Resident
from sglang_blocklora.memory.transfer import Transfer


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


class Pool(Protocol):
    """What holds the loaded adapters of one TP rank: ``AdapterPool`` or ``UnifiedPool``. Keys are ``lora_id``."""

    max_adapters_per_batch: int
    images: ImageStore
    loaded: dict[str, LoadedAdapter]

    @property
    def load_counts(self) -> LoadCounts: ...
    @property
    def arena(self) -> Arena: ...
    @property
    def resident(self) -> Mapping[str, Resident]: ...
    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None: ...
    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None: ...
    def remove(self, key: str) -> None: ...
    def is_resident(self, key: str) -> bool: ...
    def set_pinned(self, key: str, pinned: bool) -> str | None: ...
    def fits(self, keys: Iterable[str]) -> bool: ...
    def prefetch(self, keys: Iterable[str]) -> None: ...
    def load_ahead(self, key: str, keep: Iterable[str], spare: int) -> bool: ...
    def make_resident(self, keys: Iterable[str]) -> None: ...
    def slot_counts(self) -> SlotCounts: ...
    def check_integrity(self, in_use: int) -> None: ...


class AdapterPool:
    """Which adapters are loaded, and which of them are resident. Keys are SGLang's ``lora_id``.

    Every decision depends only on the order of calls and on agreed slot counts, so all TP ranks decide alike.
    """

    def __init__(
        self, arena: FreeListArena, max_adapters_per_batch: int, images: ImageStore, transfer: Transfer | None = None
    ) -> None:
        self.arena = arena
        self.images = images
        self._transfer = transfer or Transfer()
        self.max_adapters_per_batch = max_adapters_per_batch
        self.loaded: dict[str, LoadedAdapter] = {}
        self.resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first

    @property
    def load_counts(self) -> LoadCounts:
        return self.images.load_counts

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        """Take a checked adapter. The caller has asked ``reason_not_to_add``."""
        self.loaded[key] = adapter
        self.images.add(key, adapter, image)

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
        self.images.remove(key)
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
        """Whether the adapters of a batch fit the batch limit and, with all pinned ones, the arena.

        If so they are brought there, the least recently used others giving way. False too where an adapter cannot be
        read (``images.failures``); all TP ranks call this together.
        """
        wanted = sorted(key for key in set(keys) if key in self.loaded)
        if len(wanted) > self.max_adapters_per_batch:
            return False
        together = {*wanted, *(key for key, adapter in self.loaded.items() if adapter.pinned)}
        if sum(self.loaded[key].slots for key in together) > self.arena.total_slots:
            return False
        return all(self._load(key, wanted) for key in wanted)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Start to read from disk what host memory lacks of adapters wanted soon, most urgent first."""
        self.images.prefetch(
            [(key, self.loaded[key]) for key in keys if key in self.loaded and not self.is_resident(key)]
        )

    def load_ahead(self, key: str, keep: Iterable[str], spare: int) -> bool:
        """Bring an adapter into the arena before a batch needs it, unless one of ``keep`` or a pinned one had to go.

        No request's own tokens are in the arena, so ``spare`` adds nothing.
        """
        staying = {*keep, *(k for k, adapter in self.loaded.items() if adapter.pinned)} - {key}
        taken = sum(self.resident[k].adapter.slots for k in staying if k in self.resident)
        return taken + self.loaded[key].slots <= self.arena.total_slots and self._load(key, sorted(staying))

    def make_resident(self, keys: Iterable[str]) -> None:
        """Note the use of a batch's adapters, which admission (``fits``) brought into the arena.

        Keys that are not loaded are passed over (an aborted request may outlive its adapter by one step). Upstream may
        park a chunked request for a while; an adapter that gave way meanwhile is brought back.
        ``RuntimeError`` if an adapter cannot be: its requests would be answered wrongly.
        """
        wanted = sorted(key for key in set(keys) if key in self.loaded)
        for key in wanted:
            if not self._load(key, wanted):
                raise RuntimeError(f"adapter {self.loaded[key].name!r} runs but is not resident")
            self.resident.move_to_end(key)
        self._transfer.join()

    def _load(self, key: str, keep: list[str]) -> bool:
        if key in self.resident:
            return True
        adapter = self.loaded[key]
        image = self.images.get(key, adapter)
        if image is None:
            return False
        with self.load_counts.measure(key, image.nbytes):
            slots = self._allocate(adapter, keep)
            self._transfer.load(self.arena, slots, image)
            self.resident[key] = Resident(adapter, slots)
        return True

    def _allocate(self, adapter: LoadedAdapter, keep: list[str]) -> torch.Tensor:
        while (slots := self.arena.allocate(adapter.slots)) is None:
            victim = next((k for k, r in self.resident.items() if k not in keep and not r.adapter.pinned), None)
            if victim is None:
                raise RuntimeError(f"no room for adapter {adapter.name!r} ({adapter.slots} slots) in this batch")
            self.arena.free(self.resident.pop(victim).slots)
            self.load_counts.evicted(victim)
        return slots

    def slot_counts(self) -> SlotCounts:
        """Who has the arena's slots; no KV lives here and nothing else uses it."""
        adapters: Counter[str] = Counter()
        for resident in self.resident.values():
            adapters[resident.adapter.content_hash] += len(resident.slots)
        total, free = self.arena.total_slots, self.arena.free_slots
        return SlotCounts(total=total, free=free, in_use=0, adapters=adapters, kv={})

    def check_integrity(self, in_use: int = 0) -> None:
        """``IntegrityError`` unless every slot has exactly one owner and only loaded adapters are resident.

        ``in_use`` counts slots of requests, of which this arena has none.
        """
        owned = [slot for resident in self.resident.values() for slot in resident.slots.tolist()]
        if len(owned) != len(set(owned)):
            raise IntegrityError("two adapters own one slot")
        if len(owned) + self.arena.free_slots != self.arena.total_slots:
            raise IntegrityError(
                f"of {self.arena.total_slots} slots {self.arena.free_slots} are free, {len(owned)} owned"
            )
        if not set(self.resident) <= set(self.loaded):
            raise IntegrityError(f"unloaded adapters are resident: {sorted(set(self.resident) - set(self.loaded))}")
