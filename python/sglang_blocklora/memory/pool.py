"""Keeps the loaded adapters of one TP rank, and brings them into the arena when a batch needs them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Protocol

import torch

from sglang_blocklora.memory.accounting import SlotCounts
from sglang_blocklora.memory.counts import AdapterCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter, Resident
from sglang_blocklora.memory.transfer import Transfer


class Arena(Protocol):
    """Where adapter rows live. ``planes[layer]`` is (K, V), each [slots, W]."""

    @property
    def planes(self) -> Sequence[Sequence[torch.Tensor]]: ...
    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None: ...


class AdapterPool(ABC):
    """Keeps the loaded adapters and brings them into the arena; keys are SGLang's ``lora_id``.

    Every decision depends only on the order of calls and on agreed slot counts, so all TP ranks decide alike.

    arena     where adapter rows live
    loaded    adapters that requests may name
    resident  those in the arena
    """

    arena: Arena
    resident: MutableMapping[str, Resident]

    def __init__(
        self,
        max_adapters_per_batch: int,
        images: ImageStore,
        decisions: DecisionLog,
        transfer: Transfer | None = None,
    ) -> None:
        self.max_adapters_per_batch = max_adapters_per_batch
        self.images = images
        self.decisions = decisions
        self.loaded: dict[str, LoadedAdapter] = {}
        self._transfer = transfer or Transfer()

    @property
    def load_counts(self) -> AdapterCounts:
        return self.images.load_counts

    @property
    def pinned_slots(self) -> int:
        """Slots that pinned adapters take, or will."""
        return sum(adapter.slots for adapter in self.loaded.values() if adapter.pinned)

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        """Take a checked adapter. The caller has asked ``reason_not_to_add``."""
        self.loaded[key] = adapter
        self.images.add(key, adapter, image)

    def remove(self, key: str) -> None:
        """Forget an adapter. ``KeyError`` if it is not loaded."""
        self.decisions.record("unload", adapter=self.loaded.pop(key).name)
        self.images.remove(key)

    def set_pinned(self, key: str, pinned: bool) -> str | None:
        """Keep an adapter in the arena once it is there, or stop to. Why not, or None. ``KeyError`` if not loaded."""
        adapter = self.loaded[key]
        if pinned and not adapter.pinned and (reason := self.reason_not_to_add(adapter.slots, True)):
            return reason
        self.loaded[key] = dataclasses.replace(adapter, pinned=pinned)
        return None

    def bring_in(self, keys: Iterable[str]) -> bool:
        """Bring the adapters of a batch into the arena, others giving way; whether all of them are there now.

        False where they do not fit, or where one is not at hand: it is being read then, or could not be
        (``images.failures``). All TP ranks call this together.
        """
        keys = set(keys)
        wanted = sorted(key for key in keys if key in self.loaded)
        # One that was unloaded under its last requests is in the batch too.
        in_batch = len(wanted) + sum(key not in self.loaded and key in self.resident for key in keys)
        if in_batch > self.max_adapters_per_batch or not self._fit_together(wanted):
            return False
        return all(self._bring_in(key, wanted) for key in wanted)

    def prefetch(self, keys: Iterable[str]) -> None:
        """Start to read from disk what host memory lacks of adapters wanted soon, most urgent first."""
        self.images.prefetch(
            [(key, self.loaded[key]) for key in keys if key in self.loaded and not self.is_resident(key)]
        )

    @abstractmethod
    def reason_not_to_add(self, slots: int, pinned: bool) -> str | None:
        """Why an adapter of ``slots`` slots cannot be served here, or None."""

    @abstractmethod
    def kv_owner(self, key: str) -> str:
        """Under what the KV of a loaded adapter's requests is cached, in the place of its key."""

    @abstractmethod
    def is_resident(self, key: str) -> bool:
        """Whether the adapter is in the arena."""

    @abstractmethod
    def begin_step(self, keys: Iterable[str]) -> None:
        """Note that a forward pass with these adapters begins; ``resident`` holds their rows.

        ``RuntimeError`` for an adapter that is not resident: its requests would be answered wrongly.
        """

    @abstractmethod
    def slots_held_for(self, key: str | None) -> int:
        """Slots of KV that cannot be freed while a request of adapter ``key`` runs, or of the base model (None)."""

    @abstractmethod
    def arrived(self, key: str | None, prompt: object) -> None:
        """Note one request for adapter ``key``, or the base model; ``prompt`` is its key in the radix tree."""

    @abstractmethod
    def slot_counts(self) -> SlotCounts:
        """Who has the arena's slots."""

    @abstractmethod
    def check_integrity(self, in_use: int) -> None:
        """``IntegrityError`` unless every slot has exactly one owner, ``in_use`` of them requests outside the cache."""

    @abstractmethod
    def _fit_together(self, keys: Sequence[str]) -> bool:
        """Whether these adapters can be in the arena at once, as far as that is known beforehand."""

    @abstractmethod
    def _bring_in(self, key: str, keep: Sequence[str]) -> bool:
        """Bring one adapter into the arena, of which those of ``keep`` stay; whether it is there now."""
