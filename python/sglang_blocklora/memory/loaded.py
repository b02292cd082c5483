"""Records of an adapter that is loaded, and of one that is resident."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_blocklora.adapters.shard import AdapterShard


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """What stays known of an adapter while it is loaded, wherever its image is.

    slots         the count that all TP ranks agreed on (the largest of their shards)
    content_hash  sha256 in hex of the adapter's files: what its cached KV belongs to
    image_digest  sha256 in hex of this TP rank's image, which a later read must give again
    """

    name: str
    path: str
    shard: AdapterShard
    slots: int
    pinned: bool
    content_hash: str
    image_digest: str


@dataclass(frozen=True)
class Resident:
    """An adapter in the arena: its physical rows, int64 [slots] on the arena's device."""

    adapter: LoadedAdapter
    slots: torch.Tensor
