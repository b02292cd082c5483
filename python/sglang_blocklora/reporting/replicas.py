"""What data parallel replicas report (``reports.pool_facts``), as if they were one server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_blocklora.reporting.facts import AdapterFacts

SUMMED = tuple(field.name for field in dataclasses.fields(AdapterFacts) if field.default == 0)  # its counts
TIERS = ("resident", "host", "disk")
SLOTS = ("total", "free", "in_use", "adapter", "kv")


def merge_replicas(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts are summed, slots too; of an adapter's tiers the best counts."""
    adapters: dict[str, dict[str, Any]] = {}
    for one in (one for facts in replicas for one in facts["adapters"]):
        seen = adapters.setdefault(one["lora_id"], one | dict.fromkeys(SUMMED, 0))
        seen |= {key: seen[key] + one[key] for key in SUMMED}
        seen["last_error"] = seen["last_error"] or one["last_error"]
        seen["tier"] = min(seen["tier"], one["tier"], key=TIERS.index)
    return {
        **replicas[0],
        "adapters": list(adapters.values()),
        "base": {state: sum(facts["base"][state] for facts in replicas) for state in ("running", "waiting")},
        "slots": _merge_slots([facts["slots"] for facts in replicas]),
    }


def _merge_slots(replicas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    slots = {state: sum(one[state] for one in replicas) for state in SLOTS}
    owners: dict[str, dict[str, int]] = {}
    for name, counts in (pair for one in replicas for pair in one["owners"].items()):
        owner = owners.setdefault(name, dict.fromkeys(counts, 0))
        owner |= {kind: owner[kind] + count for kind, count in counts.items()}
    invalid = sum(one["invalid_kv_share"] * one["kv"] for one in replicas)
    return {**slots, "invalid_kv_share": invalid / slots["kv"] if slots["kv"] else 0.0, "owners": owners}
