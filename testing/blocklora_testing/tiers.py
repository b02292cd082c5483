"""Adapters of one number each on a disk that can fail, for pools and image stores."""

from __future__ import annotations

import hashlib

import torch
from sglang_blocklora.adapters.loading import Found, LocalShard, Report
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.loaded import LoadedAdapter

LAYERS, WIDTH = 2, 4


def numbered(number: int, slots: int, pinned: bool = False) -> tuple[LoadedAdapter, torch.Tensor]:
    """An adapter whose rows all hold its number, and its image."""
    name = f"a{number}"
    digest = hashlib.sha256(name.encode()).hexdigest()
    shard = AdapterShard(name=name, rank=1, nblocks=1, slots=slots, descriptors=(), scalings=(), entry=torch.empty(0))
    adapter = LoadedAdapter(
        name=name, path="/p", shard=shard, slots=slots, pinned=pinned, content_hash=digest, image_digest=digest
    )
    return adapter, torch.full((LAYERS, 2, slots, WIDTH), float(number))


class Disk:
    """What one TP rank reads: ``states`` has "gone" or "other" for adapters whose folder is not as it was."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.reads: list[str] = []

    def read(self, adapter: LoadedAdapter) -> Found:
        """What ``read_adapter`` makes of it: a refusal, other contents, or the image."""
        self.reads.append(adapter.name)
        state = self.states.get(adapter.name)
        if state == "gone":
            return Report(error=f"adapter {adapter.name!r}: found no folder"), None
        known, image = numbered(int(adapter.name[1:]), adapter.slots)
        digest = "other" if state == "other" else known.image_digest
        return Report(slots=adapter.slots), LocalShard(shard=known.shard, image=image, image_digest=digest)
