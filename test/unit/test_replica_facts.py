"""Several replicas' facts as those of one server. Nothing here imports SGLang."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from sglang_blocklora.reporting.facts import AdapterFacts
from sglang_blocklora.reporting.replicas import merge_replicas


def replica(running: int, tier: str, loads: int, *names: str) -> dict[str, Any]:
    counts = {"running": running, "waiting": 1, "hits": 2, "misses": loads, "host_hits": 1, "loads": loads}
    adapters = [AdapterFacts(name, "p", name, False, tier, slots=7, load_seconds=0.5, **counts) for name in names]
    kv = 10 * running
    slots = {"total": 100, "free": 86 - kv, "in_use": 0, "adapter": 14, "kv": kv, "invalid_kv_share": 0.25}
    return {
        "adapters": [dataclasses.asdict(adapter) for adapter in adapters],
        "base": {"running": running, "waiting": 0},
        "max_adapters_per_batch": 4,
        "slots": slots | {"owners": {name: {"adapter": 7, "kv": kv} for name in names}},
    }


def test_counts_and_slots_add_up_and_the_best_tier_counts() -> None:
    one, two = replica(1, "disk", 0, "a", "b"), replica(3, "resident", 1, "b", "a", "c")
    before = copy.deepcopy((one, two))
    merged = merge_replicas([one, two])
    assert (one, two) == before
    assert merged["base"] == {"running": 4, "waiting": 0}
    assert merged["max_adapters_per_batch"] == 4
    found = {adapter["name"]: adapter for adapter in merged["adapters"]}
    for name in "ab":
        adapter = found[name]
        assert (adapter["tier"], adapter["slots"], adapter["running"], adapter["waiting"]) == ("resident", 7, 4, 2)
        assert [adapter[key] for key in ("hits", "misses", "host_hits", "loads", "load_seconds")] == [4, 1, 2, 1, 1.0]
    assert found["c"] == two["adapters"][2]
    slots = merged["slots"]
    assert [slots[state] for state in ("total", "free", "in_use", "adapter", "kv")] == [200, 132, 0, 28, 40]
    assert slots["invalid_kv_share"] == 0.25
    assert slots["owners"] == {
        "a": {"adapter": 14, "kv": 40},
        "b": {"adapter": 14, "kv": 40},
        "c": {"adapter": 7, "kv": 30},
    }


def test_one_replica_is_reported_as_it_is() -> None:
    one = replica(1, "host", 0, "a")
    assert merge_replicas([one]) == one
    idle = replica(0, "host", 0)
    assert merge_replicas([idle, idle])["slots"]["invalid_kv_share"] == 0.0
