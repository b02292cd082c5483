"""Adds up what data parallel replicas tell, as if they were one server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import msgspec

from sglang_blocklora.reporting.facts import AdapterFacts, Facts, added

TIERS = ("resident", "host", "disk")


def merge_replicas(replicas: Sequence[Facts]) -> Facts:
    """Requests, counts and slots are summed; of an adapter's tiers the best counts."""
    adapters: dict[str | None, AdapterFacts] = {}
    for one in (one for facts in replicas for one in facts.adapters):
        seen = adapters.get(one.lora_id)
        adapters[one.lora_id] = one if seen is None else _merge(seen, one)
    return Facts(
        adapters=list(adapters.values()),
        base=reduce(added, (facts.base for facts in replicas)),
        max_adapters_per_batch=replicas[0].max_adapters_per_batch,
        slots=reduce(added, (facts.slots for facts in replicas)),
        queue=reduce(added, (facts.queue for facts in replicas)),
        transitions=reduce(added, (facts.transitions for facts in replicas)),
    )


def _merge(one: AdapterFacts, other: AdapterFacts) -> AdapterFacts:
    return msgspec.structs.replace(
        one,
        requests=added(one.requests, other.requests),
        counts=added(one.counts, other.counts),
        tier=min(one.tier, other.tier, key=TIERS.index),
        last_error=one.last_error or other.last_error,
    )
