"""A static pool with adapters in it, for tests of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool
from sglang_blocklora.sharding.linears import ModelSpec

from blocklora_testing.toy import host_only_images


def loaded_pool(spec: ModelSpec, adapters: Mapping[str, Path], slots: int) -> StaticPool:
    """A pool of ``slots`` slots that has loaded ``adapters``, none of them resident; all else of its rows is NaN."""
    arena = StaticArena(len(spec.layers), slots, spec.row_width, spec.dtype, torch.device("cpu"))
    arena._rows.fill_(float("nan"))
    pool = StaticPool(arena, len(adapters), host_only_images(), DecisionLog(None, 0), LRU())
    for name, folder in adapters.items():
        shard, image = load_shard(name, folder, spec, 64)
        rest = {"path": "", "pinned": False, "content_hash": "", "image_digest": ""}
        pool.add(name, LoadedAdapter(name=name, shard=shard, slots=shard.slots, **rest), image)
    return pool


def resident_pool(spec: ModelSpec, adapters: Mapping[str, Path], slots: int = 256) -> StaticPool:
    """As ``loaded_pool``, with all of them resident."""
    pool = loaded_pool(spec, adapters, slots)
    assert pool.bring_in(adapters)
    pool.begin_step(adapters)
    return pool
