"""Gathers what a server tells of its adapters: in the scheduler's process, then merged and paged for HTTP."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from sglang_blocklora.adapters.content_hash import version
from sglang_blocklora.memory.counts import AdapterCount
from sglang_blocklora.memory.durations import Durations
from sglang_blocklora.memory.pool import AdapterPool

MAX_PAGE = 1000
# Owners of slots beside the adapters' names.
BASE = "(base)"
UNLOADED = "(unloaded)"
OTHERS = "(others)"  # adapters whose names who asks may not know
# Requests that are told of the waiting queue.
QUEUE_HEAD = 10


class Requests(msgspec.Struct, kw_only=True, frozen=True):
    """Requests of an adapter, or of the base model, now."""

    running: int = 0
    waiting: int = 0


class Draining(msgspec.Struct, kw_only=True, frozen=True):
    """An earlier version of a name, which the last of its requests still have."""

    version: str
    lora_id: str
    running: int
    waiting: int


class AdapterFacts(msgspec.Struct, kw_only=True, frozen=True):
    """One adapter, as ``GET /adapters`` shows it. Two may have one name while the older one's last requests run.

    lora_id            what it is known by; None before its first load
    tier               "resident" (in the arena), "host" (in host memory) or "disk" (read when asked for)
    invocation         token ids from which on an activated adapter is active; empty for others
    invocation_text    in the HTTP process: the text that gives these tokens; None where there is none
    bytes_per_tp_rank  rows of the arena on every TP rank, padding included
    draining           in the HTTP process: versions of the name that were current before
    """

    name: str
    path: str | None
    lora_id: str | None
    pinned: bool
    tier: str
    content_hash: str | None = None
    rank: int | None = None
    nblocks: int | None = None
    invocation: list[int] = msgspec.field(default_factory=list)
    invocation_text: str | None = None
    slots: int | None = None
    bytes_per_tp_rank: int | None = None
    requests: Requests = Requests()
    counts: AdapterCount = msgspec.field(default_factory=AdapterCount)
    draining: list[Draining] = []
    last_error: str | None = None


class OwnedSlots(msgspec.Struct, kw_only=True, frozen=True):
    """Slots that hold an owner's weights, and those that hold its cached KV."""

    adapter: int = 0
    kv: int = 0


class SlotFacts(msgspec.Struct, kw_only=True, frozen=True):
    """Slots of one TP rank: ``free``, ``in_use`` (by running requests), ``adapter`` and ``kv`` add up to ``total``.

    invalid_kv  slots of ``kv`` whose adapter is not resident
    owners      name -> its part of ``adapter`` and ``kv``
    """

    total: int
    free: int
    in_use: int
    adapter: int
    kv: int
    invalid_kv: int
    owners: dict[str, OwnedSlots]

    @property
    def invalid_kv_share(self) -> float:
        """Share of cached KV whose adapter is not resident."""
        return self.invalid_kv / self.kv if self.kv else 0.0


class Waiting(msgspec.Struct, kw_only=True, frozen=True):
    """A request in the waiting queue; ``adapter`` is None for the base model."""

    adapter: str | None
    prompt_tokens: int


class Facts(msgspec.Struct, kw_only=True, frozen=True):
    """All that TP rank 0 of a scheduler tells: plain data, so that it can travel.

    queue        the first of the waiting queue, in its order
    transitions  how long it took to bring adapters from disk to host memory ("load") and from there into the arena
                 ("activate")
    """

    adapters: list[AdapterFacts]
    base: Requests
    max_adapters_per_batch: int
    slots: SlotFacts
    queue: list[Waiting] = []
    transitions: dict[str, Durations] = {}


def pool_facts(
    pool: AdapterPool,
    slot_bytes: int,
    running: Mapping[str | None, int],
    waiting: Mapping[str | None, int],
    head: Sequence[tuple[str | None, int]] = (),
) -> Facts:
    """Facts of one TP rank's pool.

    running, waiting  requests per ``lora_id``, None for the base model
    head              ``lora_id`` and prompt tokens of the first waiting requests
    """

    def requests(key: str | None) -> Requests:
        return Requests(running=running.get(key, 0), waiting=waiting.get(key, 0))

    def name_of(key: str | None) -> str | None:
        return None if key is None else pool.loaded[key].name if key in pool.loaded else UNLOADED

    adapters = [
        AdapterFacts(
            name=adapter.name,
            path=adapter.path,
            lora_id=key,
            pinned=adapter.pinned,
            tier=tier(pool, key),
            content_hash=adapter.content_hash,
            rank=adapter.shard.rank,
            nblocks=adapter.shard.nblocks,
            invocation=list(adapter.shard.invocation),
            slots=adapter.slots,
            bytes_per_tp_rank=adapter.slots * slot_bytes,
            requests=requests(key),
            counts=pool.load_counts.of(key),
            last_error=pool.images.last_errors.get(key),
        )
        for key, adapter in pool.loaded.items()
    ]
    return Facts(
        adapters=adapters,
        base=requests(None),
        max_adapters_per_batch=pool.max_adapters_per_batch,
        slots=slot_facts(pool),
        queue=[Waiting(adapter=name_of(key), prompt_tokens=tokens) for key, tokens in head],
        transitions={"load": pool.images.read_durations, "activate": pool.load_counts.durations},
    )


def tier(pool: AdapterPool, key: str) -> str:
    """Where a loaded adapter is now."""
    if pool.is_resident(key):
        return "resident"
    return "host" if pool.images.in_host_memory(key) else "disk"


def slot_facts(pool: AdapterPool) -> SlotFacts:
    """Slots of one TP rank by owner.

    Contents that have several names count under the first; those that lost their name, under ``UNLOADED``.
    """
    counts = pool.slot_counts()
    names: dict[str | None, str] = {a.content_hash: a.name for a in reversed(pool.loaded.values())}
    names[None] = BASE
    owned = [(content_hash, OwnedSlots(adapter=slots)) for content_hash, slots in counts.adapters.items()]
    owners: dict[str, OwnedSlots] = {}
    for content_hash, own in (*owned, *((content_hash, OwnedSlots(kv=kv)) for content_hash, kv in counts.kv.items())):
        name = names.get(content_hash, UNLOADED)
        owners[name] = added(owners.get(name, OwnedSlots()), own)
    return SlotFacts(
        total=counts.total,
        free=counts.free,
        in_use=counts.in_use,
        adapter=sum(counts.adapters.values()),
        kv=sum(counts.kv.values()),
        invalid_kv=counts.invalid_kv,
        owners=owners,
    )


def added(one: Any, other: Any) -> Any:
    """The sum of two numbers, of two structs field by field, or of two mappings key by key."""
    if isinstance(one, msgspec.Struct):
        fields = one.__struct_fields__
        return type(one)(**{name: added(getattr(one, name), getattr(other, name)) for name in fields})
    if isinstance(one, Mapping):
        both = {key: added(one[key], other[key]) for key in one.keys() & other.keys()}
        return {**one, **other, **both}
    return one + other


def merge_facts(
    facts: Facts,
    known: Iterable[tuple[str, str | None, str | None, bool]],
    errors: Mapping[str, str],
    draining: Collection[str] = (),
) -> list[AdapterFacts]:
    """All adapters that a request can name, by name.

    known     (name, path, lora_id, pinned) of every adapter known to the HTTP process; those that the scheduler has not
            loaded are loaded when a request names them
    errors    name -> what last went wrong with it in the HTTP process
    draining  lora_ids whose name is gone or another's; those of names that are known are told
    """
    earlier: dict[str, list[Draining]] = {}
    for one in facts.adapters:
        if one.lora_id is not None and one.lora_id in draining and one.content_hash is not None:
            earlier.setdefault(one.name, []).append(
                Draining(
                    version=version(one.content_hash),
                    lora_id=one.lora_id,
                    running=one.requests.running,
                    waiting=one.requests.waiting,
                )
            )
    loaded = {one.lora_id: one for one in facts.adapters}
    found = []
    for name, path, lora_id, pinned in sorted(known, key=lambda one: one[0]):
        there = loaded.get(lora_id) if lora_id else None
        one = there or AdapterFacts(name=name, path=path, lora_id=lora_id, pinned=pinned, tier="disk")
        last_error = one.last_error or errors.get(name)
        shown = msgspec.structs.replace(one, path=path or one.path, last_error=last_error)  # a URL, not its copy here
        found.append(msgspec.structs.replace(shown, draining=earlier.get(name, [])))
    return found


def page(adapters: Sequence[AdapterFacts], limit: int, after: str | None) -> dict[str, Any]:
    """At most ``limit`` adapters whose names come after ``after``, as OpenAI's lists are paged."""
    rest = [one for one in adapters if after is None or one.name > after]
    shown = rest[:limit]
    return {
        "object": "list",
        "data": [told(one) for one in shown],
        "total": len(adapters),
        "has_more": len(rest) > len(shown),
        "last_id": shown[-1].name if shown else None,
    }


def told(adapter: AdapterFacts) -> dict[str, Any]:
    """An adapter as ``GET /adapters`` shows it."""
    flat: dict[str, Any] = msgspec.to_builtins(adapter)
    flat["version"] = adapter.content_hash and version(adapter.content_hash)
    for part in ("requests", "counts"):
        flat.update(flat.pop(part))
    return flat


def slots_told(slots: SlotFacts) -> dict[str, Any]:
    """Slots as ``GET /adapters`` shows them."""
    told: dict[str, Any] = msgspec.to_builtins(slots)
    del told["invalid_kv"]
    return told | {"invalid_kv_share": slots.invalid_kv_share}


def only_of(facts: Facts, may_know: Callable[[str], bool]) -> Facts:
    """``facts`` in whose slots and queue the other adapters have one name together."""

    def shown(name: str) -> str:
        return name if name in (BASE, UNLOADED) or may_know(name) else OTHERS

    owners: dict[str, OwnedSlots] = {}
    for name, owned in facts.slots.owners.items():
        owners[shown(name)] = added(owners.get(shown(name), OwnedSlots()), owned)
    queue = [
        one if one.adapter is None else msgspec.structs.replace(one, adapter=shown(one.adapter)) for one in facts.queue
    ]
    return msgspec.structs.replace(facts, slots=msgspec.structs.replace(facts.slots, owners=owners), queue=queue)


def queue_told(facts: Facts) -> dict[str, Any]:
    """The waiting queue as ``GET /adapters`` shows it."""
    waiting = facts.base.waiting + sum(adapter.requests.waiting for adapter in facts.adapters)
    return {"waiting": waiting, "head": msgspec.to_builtins(facts.queue)}
