"""Several replicas' facts as those of one server. Nothing here imports SGLang."""

from __future__ import annotations

from sglang_blocklora.memory.counts import AdapterCount
from sglang_blocklora.reporting.facts import AdapterFacts, Facts, OwnedSlots, Requests, SlotFacts
from sglang_blocklora.reporting.replicas import merge_replicas


def replica(running: int, tier: str, loads: int, *names: str) -> Facts:
    kv = 10 * running
    return Facts(
        adapters=[
            AdapterFacts(
                name=name,
                path="p",
                lora_id=name,
                pinned=False,
                tier=tier,
                slots=7,
                requests=Requests(running=running, waiting=1),
                counts=AdapterCount(hits=2, misses=loads, host_hits=1, loads=loads, load_seconds=0.5),
            )
            for name in names
        ],
        base=Requests(running=running, waiting=0),
        max_adapters_per_batch=4,
        slots=SlotFacts(
            total=100,
            free=86 - kv,
            in_use=0,
            adapter=14,
            kv=kv,
            invalid_kv=running,
            owners={name: OwnedSlots(adapter=7, kv=kv) for name in names},
        ),
    )


def test_counts_and_slots_add_up_and_the_best_tier_counts() -> None:
    one, two = replica(1, "disk", 0, "a", "b"), replica(3, "resident", 1, "b", "a", "c")
    merged = merge_replicas([one, two])
    assert (one, two) == (replica(1, "disk", 0, "a", "b"), replica(3, "resident", 1, "b", "a", "c"))
    assert merged.base == Requests(running=4, waiting=0)
    assert merged.max_adapters_per_batch == 4
    found = {adapter.name: adapter for adapter in merged.adapters}
    for name in "ab":
        adapter = found[name]
        assert (adapter.tier, adapter.slots, adapter.requests) == ("resident", 7, Requests(running=4, waiting=2))
        assert adapter.counts == AdapterCount(hits=4, misses=1, host_hits=2, loads=1, load_seconds=1.0)
    assert found["c"] == two.adapters[2]
    slots = merged.slots
    assert (slots.total, slots.free, slots.in_use, slots.adapter, slots.kv) == (200, 132, 0, 28, 40)
    assert slots.invalid_kv_share == 0.1
    assert slots.owners == {
        "a": OwnedSlots(adapter=14, kv=40),
        "b": OwnedSlots(adapter=14, kv=40),
        "c": OwnedSlots(adapter=7, kv=30),
    }


def test_one_replica_is_reported_as_it_is() -> None:
    one = replica(1, "host", 0, "a")
    assert merge_replicas([one]) == one
    idle = replica(0, "host", 0)
    assert merge_replicas([idle, idle]).slots.invalid_kv_share == 0.0
