"""Whose each slot of the arena is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SlotCounts:
    """Slots of one TP rank's arena; free, in use, adapters and KV add up to the total.

    in_use    of running requests and not in the radix tree
    adapters  slots of weights, by content hash
    kv        slots of cached KV, by the content hash of the adapter that it belongs to, None for the base model
    """

    total: int
    free: int
    in_use: int
    adapters: Mapping[str, int]
    kv: Mapping[str | None, int]

    @property
    def invalid_kv(self) -> int:
        """Slots of KV that no request can use, because its adapter is not resident."""
        return sum(count for owner, count in self.kv.items() if owner is not None and owner not in self.adapters)


class SlotOwners:
    """For each slot the adapter (content hash, None for the base model) for which it was last written."""

    def __init__(self, slots: int, device: torch.device | str) -> None:
        """``slots`` is one more than the highest slot number."""
        # On the slots' own device, so that noting an owner never waits for it.
        self._of_slot = torch.zeros(slots, dtype=torch.int32, device=device)
        self._numbers: dict[str | None, int] = {None: 0}

    def wrote(self, owner: str | None, slots: torch.Tensor) -> None:
        """Note that ``slots`` (int64) hold something of ``owner``."""
        self._of_slot.index_fill_(0, slots, self._numbers.setdefault(owner, len(self._numbers)))

    def count(self, slots: torch.Tensor) -> dict[str | None, int]:
        """How many of ``slots`` (int64) each owner has; owners without any are left out."""
        counts = torch.bincount(self._of_slot[slots], minlength=len(self._numbers)).tolist()
        return {owner: counts[number] for owner, number in self._numbers.items() if counts[number]}
