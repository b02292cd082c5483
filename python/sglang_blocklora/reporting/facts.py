"""What a server reports about its adapters: facts of the scheduler's process, merged and paged in the HTTP process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_blocklora.memory.static_pool import Pool

MAX_PAGE = 1000
# Owners of slots beside the adapters' names.
BASE = "(base)"
UNLOADED = "(unloaded)"


@dataclass(frozen=True)
class AdapterFacts:
    """One adapter, as ``GET /adapters`` shows it.

    bytes_per_tp_rank  rows of the arena on every TP rank, padding included
    tier               "resident" (in the arena), "host" (in host memory) or "disk" (read when asked for)
    running, waiting   requests now
    hits, misses       requests that found it resident when they arrived, or not; host_hits: of the misses, those that
                       found it in host memory
    loads, evictions   times it was brought into the arena, and was put out of it
    bytes_copied       to the arena of TP rank 0, over all loads
    disk_reads         loads for which its folder was read again, because host memory did not hold it
    host_evictions     times it gave way in host memory
    """

    name: str
    path: str | None
    lora_id: str | None
    pinned: bool
    tier: str
    content_hash: str | None = None
    rank: int | None = None
    nblocks: int | None = None
    slots: int | None = None
    bytes_per_tp_rank: int | None = None
    running: int = 0
    waiting: int = 0
    hits: int = 0
    misses: int = 0
    host_hits: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    bytes_copied: int = 0
    disk_reads: int = 0
    host_evictions: int = 0
    last_error: str | None = None


def pool_facts(
    pool: Pool, slot_bytes: int, running: Mapping[str | None, int], waiting: Mapping[str | None, int]
) -> dict[str, Any]:
    """Facts of one TP rank's pool as plain data, for the trip to the HTTP process.

    running, waiting  requests per ``lora_id``, None for the base model
    """
    adapters = []
    for key, adapter in pool.loaded.items():
        count = pool.load_counts.of(key)
        facts = AdapterFacts(
            name=adapter.name,
            path=adapter.path,
            lora_id=key,
            pinned=adapter.pinned,
            tier=tier(pool, key),
            content_hash=adapter.content_hash,
            rank=adapter.shard.rank,
            nblocks=adapter.shard.nblocks,
            slots=adapter.slots,
            bytes_per_tp_rank=adapter.slots * slot_bytes,
            running=running.get(key, 0),
            waiting=waiting.get(key, 0),
            hits=count.hits,
            misses=count.misses,
            host_hits=count.host_hits,
            loads=count.loads,
            load_seconds=count.seconds,
            evictions=count.evictions,
            bytes_copied=count.bytes_copied,
            disk_reads=count.disk_reads,
            host_evictions=count.host_evictions,
            last_error=pool.images.last_errors.get(key),
        )
        adapters.append(dataclasses.asdict(facts))
    base = {"running": running.get(None, 0), "waiting": waiting.get(None, 0)}
    return {
        "adapters": adapters,
        "base": base,
        "max_adapters_per_batch": pool.max_adapters_per_batch,
        "slots": slot_facts(pool),
    }


def tier(pool: Pool, key: str) -> str:
    """Where a loaded adapter is now."""
    if pool.is_resident(key):
        return "resident"
    return "host" if pool.images.in_host_memory(key) else "disk"


def slot_facts(pool: Pool) -> dict[str, Any]:
    """Slots of one TP rank by owner: free, in use and those of all owners add up to the total.

    Contents that have several names count under the first; those that lost their name, under ``UNLOADED``.
    """
    counts = pool.slot_counts()
    names = {adapter.content_hash: adapter.name for adapter in reversed(pool.loaded.values())}
    owners: dict[str, dict[str, int]] = {}
    for kind, slots in (("adapter", counts.adapters), ("kv", counts.kv)):
        for content_hash, count in slots.items():
            name = BASE if content_hash is None else names.get(content_hash, UNLOADED)
            owner = owners.setdefault(name, {"adapter": 0, "kv": 0})
            owner[kind] += count
    kv = sum(counts.kv.values())
    return {
        "total": counts.total,
        "free": counts.free,
        "in_use": counts.in_use,
        "adapter": sum(counts.adapters.values()),
        "kv": kv,
        "invalid_kv_share": counts.invalid_kv / kv if kv else 0.0,
        "owners": owners,
    }


def merge_facts(
    facts: Mapping[str, Any], on_disk: Iterable[tuple[str, str | None, str | None, bool]], errors: Mapping[str, str]
) -> list[AdapterFacts]:
    """All adapters that a request can name, by name.

    on_disk  (name, path, lora_id, pinned) of every adapter known to the HTTP process; those that the scheduler has not
             loaded are loaded when a request names them
    errors   name -> what last went wrong with it in the HTTP process
    """
    adapters = {one["name"]: AdapterFacts(**one) for one in facts["adapters"]}
    for name, path, lora_id, pinned in on_disk:
        if name not in adapters:
            adapters[name] = AdapterFacts(name, path, lora_id, pinned, "disk")
    return [
        dataclasses.replace(adapters[name], last_error=adapters[name].last_error or errors.get(name))
        for name in sorted(adapters)
    ]


def page(adapters: Sequence[AdapterFacts], limit: int, after: str | None) -> dict[str, Any]:
    """At most ``limit`` adapters whose names come after ``after``, as OpenAI's lists are paged."""
    rest = [one for one in adapters if after is None or one.name > after]
    shown = rest[:limit]
    return {
        "object": "list",
        "data": [dataclasses.asdict(one) for one in shown],
        "total": len(adapters),
        "has_more": len(rest) > len(shown),
        "last_id": shown[-1].name if shown else None,
    }


def openai_error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error body in OpenAI's form."""
    kind = {400: "invalid_request_error", 404: "not_found_error"}[status]
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}
