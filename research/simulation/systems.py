"""Ways to keep adapters and KV in one GPU's memory, each made of the real classes with the copies left out.

All get the same bytes. What they share: a radix cache, ``fits`` (what the scheduler asks before it admits a request)
and ``prepare`` (what runs before a batch). ``take_load_s`` is the time of copies since it was last asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import torch
from blocklora_testing.ranks import HandReads
from sglang_blocklora.adapters.loading import Found
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import DEFAULT_STRATEGY, LRU, STRATEGIES
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool
from sglang_blocklora.memory.unified_pool import UnifiedPool

from research.simulation import upstream
from research.simulation.costs import PAGE_TOKENS, Costs
from research.simulation.traffic import pages

MAX_RUNNING = 256  # batch sizes that decode graphs are captured for on an H100 by default
LONGEST_PAGES = 2048  # 32k tokens
STOCK_SLOTS = 8  # --max-loras-per-batch of stock SGLang
OUR_ADAPTERS_PER_BATCH = 64  # of our launcher


@dataclass(frozen=True)
class Adapter:
    """``slots`` is in tokens of KV; ``lora_id`` and ``content_hash`` as SGLang and we make them.

    invocation  of an activated adapter, in pages
    """

    index: int
    rank: int
    slots: int
    slot_bytes: int
    invocation: tuple[int, ...] = ()

    @cached_property
    def lora_id(self) -> str:
        return self.content_hash[:32]

    @cached_property
    def content_hash(self) -> str:
        return hashlib.sha256(f"adapter {self.index}".encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def nbytes(self) -> int:
        """As an image's: an adapter stands for its own, which is never read here."""
        return self.size_bytes

    def loaded(self) -> LoadedAdapter:
        """As our pools keep it."""
        shard = SimpleNamespace(slots=pages(self.slots), invocation=self.invocation)
        return LoadedAdapter(
            name=str(self.index),
            path="",
            shard=shard,  # type: ignore[arg-type]
            slots=pages(self.slots),
            pinned=False,
            content_hash=self.content_hash,
            image_digest="",
        )


def make_adapters(ranks: Sequence[int], count: int, costs: Costs) -> list[Adapter]:
    """``count`` plain adapters of all linears, their ranks taking turns."""
    slots = {rank: costs.model.adapter_slots(rank) for rank in set(ranks)}
    return [
        Adapter(i, r, slots[r], costs.model.slot_bytes) for i, r in ((i, ranks[i % len(ranks)]) for i in range(count))
    ]


def all_in_host_memory() -> ImageStore:
    """Host memory for every adapter: nothing is read from disk again."""

    def read(adapter: LoadedAdapter) -> Found:
        raise AssertionError(f"{adapter.name} was read again")

    return ImageStore(2**62, 1, read, HandReads(), DecisionLog(None, 0))  # type: ignore[arg-type]


class System:
    """What is the same for all: the cache and the account of copies."""

    cache_class: type = upstream.UnifiedRadixCache
    match_s: float

    def __init__(self, adapters: Sequence[Adapter], kv_slots: int, costs: Costs) -> None:
        self.costs = costs
        self.adapters = {adapter.lora_id: adapter for adapter in adapters}
        self.cache = upstream.new_cache(self.cache_class, kv_slots // PAGE_TOKENS, MAX_RUNNING, LONGEST_PAGES)
        self.match_s = costs.plain_match_s
        # The adapter whose KV a slot holds; -1: none, or weights.
        self.owner = np.full(kv_slots // PAGE_TOKENS + 1, -1, dtype=np.int64)
        self.loads = 0
        self.copied_bytes = 0
        self._load_s = 0.0

    def count_load(self, adapter: Adapter, seconds: float) -> None:
        self.loads += 1
        self.copied_bytes += adapter.size_bytes
        self._load_s += seconds

    def take_load_s(self) -> float:
        taken, self._load_s = self._load_s, 0.0
        return taken

    def fits(self, lora_ids: set[str]) -> bool:
        raise NotImplementedError

    def prepare(self, lora_ids: Iterable[str]) -> None:
        raise NotImplementedError

    def is_resident(self, lora_id: str) -> bool:
        raise NotImplementedError

    def arrived(self, request: upstream.Req) -> None:
        """Told of each request once, as it comes."""


class _StockPool(upstream.LoRAMemoryPool):
    """SGLang's slot pool without buffers: ``prepare_lora_batch`` is its own, loading is counted."""

    def __init__(self, system: System, slots: int) -> None:
        self.system = system
        self.max_loras_per_batch = slots
        self.eviction_policy = upstream.LRUEvictionPolicy()
        self.uid_to_buffer_id: dict[str | None, int] = {}
        self.buffer_id_to_uid = [upstream.EMPTY_SLOT] * slots

    def load_lora_weight_to_buffer(self, uid: str, *args: object, **kwargs: object) -> None:
        adapter = self.system.adapters[uid]
        self.system.count_load(adapter, self.system.costs.load_per_tensor_s(adapter.size_bytes))


class StockSlots(System):
    """Stock SGLang: slots padded to the largest rank, apart from the KV pool; KV of evicted adapters stays cached."""

    def __init__(
        self, adapters: Sequence[Adapter], total_slots: int, costs: Costs, adapter_slots: int = STOCK_SLOTS
    ) -> None:
        super().__init__(adapters, total_slots - adapter_slots * max(a.slots for a in adapters), costs)
        self.pool = _StockPool(self, adapter_slots)
        self.manager = SimpleNamespace(max_loras_per_batch=adapter_slots, num_pinned_loras=0)

    def fits(self, lora_ids: set[str]) -> bool:
        return upstream.LoRAManager.validate_lora_batch(self.manager, lora_ids)

    def prepare(self, lora_ids: Iterable[str]) -> None:
        self.pool.prepare_lora_batch(set(lora_ids), {}, [], {}, None, None)

    def is_resident(self, lora_id: str) -> bool:
        return lora_id in self.pool.uid_to_buffer_id


class _CountedArena(StaticArena):
    """Our static arena with its real free list and rows of one element; writes are counted."""

    def __init__(self, system: System, slots: int) -> None:
        super().__init__(1, slots, 1, torch.int8, torch.device("cpu"))
        self.system = system

    def write(self, slots: torch.Tensor, image: object) -> None:
        assert isinstance(image, Adapter)
        self.system.count_load(image, self.system.costs.load_image_s(image.size_bytes))


class Static(System):
    """``--adapter-memory static``: an arena as large as stock's slots, unpadded, apart from the KV pool."""

    def __init__(self, adapters: Sequence[Adapter], total_slots: int, costs: Costs) -> None:
        arena = STOCK_SLOTS * max(a.slots for a in adapters)
        super().__init__(adapters, total_slots - arena, costs)
        self.pool = StaticPool(
            _CountedArena(self, arena // PAGE_TOKENS),
            OUR_ADAPTERS_PER_BATCH,
            all_in_host_memory(),
            DecisionLog(None, 0),
            LRU(),
        )
        for adapter in adapters:
            self.pool.add(adapter.lora_id, adapter.loaded(), adapter)  # type: ignore[arg-type]

    def fits(self, lora_ids: set[str]) -> bool:
        return self.pool.bring_in(lora_ids)

    def prepare(self, lora_ids: Iterable[str]) -> None:
        self.pool.begin_step(lora_ids)

    def is_resident(self, lora_id: str) -> bool:
        return self.pool.is_resident(lora_id)


class _CountedRows:
    """The KV buffers as rows; writes are counted."""

    planes = ()

    def __init__(self, system: System) -> None:
        self.system = system

    def write(self, slots: torch.Tensor, image: object) -> None:
        assert isinstance(image, Adapter)
        self.system.owner[slots.numpy()] = -1
        self.system.count_load(image, self.system.costs.load_image_s(image.size_bytes))


class Unified(System):
    """``--adapter-memory unified``: all bytes are one pool, an adapter is a prefix of its KV.

    eviction  ``--adapter-eviction``
    """

    cache_class = upstream.AdapterPrefixCache

    def __init__(
        self, adapters: Sequence[Adapter], total_slots: int, costs: Costs, eviction: str = DEFAULT_STRATEGY
    ) -> None:
        super().__init__(adapters, total_slots, costs)
        self.match_s = costs.prefix_match_s
        self.cache.strategy = STRATEGIES[eviction]()
        self.pool = UnifiedPool(OUR_ADAPTERS_PER_BATCH, all_in_host_memory(), DecisionLog(None, 0))
        self.pool.bind_arena(_CountedRows(self), total_slots // PAGE_TOKENS)  # type: ignore[arg-type]
        self.pool.bind_cache(self.cache)
        for adapter in adapters:
            self.pool.add(adapter.lora_id, adapter.loaded(), adapter)  # type: ignore[arg-type]
        manager = SimpleNamespace(pool=self.pool)
        self._scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)))

    def fits(self, lora_ids: set[str]) -> bool:
        return self.pool.bring_in(lora_ids)

    def prepare(self, lora_ids: Iterable[str]) -> None:
        self.pool.begin_step(lora_ids)

    def is_resident(self, lora_id: str) -> bool:
        return self.pool.is_resident(lora_id)

    def arrived(self, request: upstream.Req) -> None:
        upstream.activate(self._scheduler, request)
        self.cache.arrived(request.lora_id, upstream.RadixKey(request.origin_input_ids, request.extra_key))
