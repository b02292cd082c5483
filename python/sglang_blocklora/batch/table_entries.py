"""Gives each resident adapter of a batch its entry in the kernels' table."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from blocklora_kernels.table import AdapterTable

from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.sharding.linears import ModelSpec
from sglang_blocklora.sharding.plan import most_slots


class TableEntries:
    """An ``AdapterTable`` and whose each entry is. An entry stays written while its adapter stays where it is."""

    def __init__(self, spec: ModelSpec, adapters: int, max_rank: int, device: torch.device) -> None:
        """``adapters`` is the most of a batch; twice as many keep their entries."""
        self._size = 2 * adapters
        slots = most_slots(spec, max_rank)
        self.table = AdapterTable(len(spec.layers), max(map(len, spec.layers)), self._size, slots, device)
        self._owners: dict[str, tuple[int, Resident]] = {}

    def of(self, keys: Set[str], resident: Mapping[str, Resident]) -> dict[str, int]:
        """Entry of every key, written in stream order where the adapter was made resident since.

        keys      of resident adapters, at most as many as a batch may have
        resident  all that are resident
        """
        self._owners = {key: own for key, own in self._owners.items() if resident.get(key) is own[1]}
        free = sorted(set(range(self._size)) - {entry for entry, _ in self._owners.values()})
        for key in sorted(keys - self._owners.keys()):
            if not free:
                victim = next(known for known in self._owners if known not in keys)
                free.append(self._owners.pop(victim)[0])
            entry, shard = free.pop(0), resident[key].adapter.shard
            self.table.write(entry, resident[key].slots[: shard.slots], shard.entry)
            self._owners[key] = (entry, resident[key])
        return {key: self._owners[key][0] for key in keys}
