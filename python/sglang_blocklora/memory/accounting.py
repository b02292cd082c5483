"""Counts who owns each slot of the arena, and says so where the count does not add up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

FORGOTTEN = "forgotten"  # owner of slots that outlived their adapter, which is a fault


class IntegrityError(RuntimeError):
    """What this extension keeps account of is not as it must be: a fault of the program, not of a request."""


@dataclass(frozen=True, kw_only=True)
class SlotCounts:
    """Slots of one TP rank's arena; free, in use, adapters and KV add up to the total.

    in_use     of running requests and not in the radix tree
    adapters   slots of weights, by content hash
    kv         slots of cached KV, by the content hash of the adapter that it belongs to, None for the base model
    activated  content hashes of activated adapters, whose KV waits for the weights where these are put out
    """

    total: int
    free: int
    in_use: int
    adapters: Mapping[str, int]
    kv: Mapping[str | None, int]
    activated: Collection[str] = ()

    @property
    def invalid_kv(self) -> int:
        """Slots of KV that no request can use, because its adapter is not resident."""
        usable = {None, *self.adapters, *self.activated}
        return sum(count for owner, count in self.kv.items() if owner not in usable)


class SlotOwners:
    """Notes for each slot the adapter (content hash, None for the base model) and what was last written to it."""

    def __init__(self, slots: int, device: torch.device | str) -> None:
        """``slots`` is one more than the highest slot number."""
        # On the slots' own device, so that noting an owner never waits for it: twice the owner's number, and one more
        # for weights, so that weights and KV are counted apart whatever was written over what.
        self._of_slot = torch.zeros(slots, dtype=torch.int32, device=device)
        self._numbers: dict[str | None, int] = {None: 0}
        self._unused: list[int] = []

    def wrote_kv(self, owner: str | None, slots: torch.Tensor) -> None:
        """Note that ``slots`` (int64) hold KV of ``owner``."""
        self._of_slot.index_fill_(0, slots, 2 * self._number(owner))

    def wrote_weights(self, owner: str, slots: torch.Tensor) -> None:
        """Note that ``slots`` (int64) hold weights of ``owner``."""
        self._of_slot.index_fill_(0, slots, 2 * self._number(owner) + 1)

    def forget(self, owner: str) -> None:
        """Use the owner's number for another one. What it still has counts as ``FORGOTTEN`` until then."""
        if owner in self._numbers:
            self._unused.append(self._numbers.pop(owner))

    def count(self, slots: torch.Tensor) -> tuple[dict[str, int], dict[str | None, int]]:
        """How many of ``slots`` (int64) hold each owner's weights, and its KV; those without any are left out."""
        known: dict[int, str | None] = {number: owner for owner, number in self._numbers.items()}
        counts = torch.bincount(self._of_slot[slots]).tolist()
        weights: dict[str, int] = {}
        kv: dict[str | None, int] = {}
        for code, count in enumerate(counts):
            if count:
                number, is_weights = divmod(code, 2)
                owner = known.get(number, FORGOTTEN)
                owners: dict[str | None, int] = weights if is_weights else kv  # type: ignore[assignment]
                owners[owner] = owners.get(owner, 0) + count
        return weights, kv

    def _number(self, owner: str | None) -> int:
        if owner not in self._numbers:
            self._numbers[owner] = self._unused.pop() if self._unused else len(self._numbers)
        return self._numbers[owner]
