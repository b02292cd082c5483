"""Adapters of one number each on a disk that can fail, for pools and image stores."""

from __future__ import annotations

import hashlib

import torch
from sglang_blocklora.adapters.loading import Outcome
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.loaded import LoadedAdapter

LAYERS, WIDTH = 2, 4


def numbered(number: int, slots: int, pinned: bool = False) -> tuple[LoadedAdapter, torch.Tensor]:
    """An adapter whose rows all hold its number, and its image."""
    name = f"a{number}"
    image = torch.full((LAYERS, 2, slots, WIDTH), float(number))
    digest = hashlib.sha256(name.encode()).hexdigest()
    return LoadedAdapter(
        name,
        "/p",
        AdapterShard(name=name, rank=1, nblocks=1, slots=slots, descriptors=(), scalings=(), shares=()),
        slots,
        pinned,
        digest,
        digest,
    ), image


class Disk:
    """What one TP rank reads: ``states`` has "gone" or "other" for adapters whose folder is not as it was."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.reads: list[str] = []

    def read(self, adapter: LoadedAdapter) -> Outcome:
        """What ``attempt`` makes of it: a refusal, other contents, or the image."""
        self.reads.append(adapter.name)
        state = self.states.get(adapter.name)
        if state == "gone":
            return Outcome(f"adapter {adapter.name!r}: found no folder", 0)
        known, image = numbered(int(adapter.name[1:]), adapter.slots)
        digest = "other" if state == "other" else known.image_digest
        return Outcome(None, adapter.slots, known.shard, image, digest)
