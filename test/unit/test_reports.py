"""Paging, labels and totals: what the HTTP process makes of the scheduler's facts."""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from sglang_blocklora.memory.accounting import SlotCounts, SlotOwners
from sglang_blocklora.memory.counts import LoadCounts
from sglang_blocklora.reporting.facts import AdapterFacts, merge_facts, page, slot_facts
from sglang_blocklora.reporting.prometheus import AdapterCollector, LabelBudget

SLOTS = {
    "total": 100,
    "free": 50,
    "in_use": 11,
    "adapter": 19,
    "kv": 20,
    "invalid_kv_share": 0.0,
    "owners": {
        "a": {"adapter": 7, "kv": 4},
        "b": {"adapter": 7, "kv": 0},
        "c": {"adapter": 5, "kv": 6},
        "(base)": {"adapter": 0, "kv": 10},
    },
}


def facts(**adapters: dict[str, Any]) -> dict[str, Any]:
    """Facts of the scheduler for adapters of these names."""
    plain = {"path": "/p", "pinned": False, "tier": "resident", "slots": 7}
    return {
        "adapters": [{"name": name, "lora_id": f"id-{name}"} | plain | own for name, own in adapters.items()],
        "base": {"running": 1, "waiting": 0},
        "max_adapters_per_batch": 8,
        "slots": SLOTS,
    }


def exposed(collector: AdapterCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = (line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


COUNTS = {"running": 0, "waiting": 0, "loads": 0, "load_seconds": 0.0, "evictions": 0}
COUNTS |= {"hits": 0, "misses": 0, "host_hits": 0, "bytes_copied": 0, "disk_reads": 0, "host_evictions": 0}


def test_labels_are_bounded_and_an_adapter_keeps_its_own() -> None:
    budget = LabelBudget(2)
    names = [budget.label(name) for name in ("a", "b", "c", "a", None, "d", "b")]
    assert names == ["a", "b", "other", "a", "(base)", "other", "b"]


def test_adapters_beyond_the_budget_are_summed() -> None:
    collector = AdapterCollector(LabelBudget(1))
    collector.update(facts(a=COUNTS | {"running": 2}, b=COUNTS | {"running": 3}, c=COUNTS | {"running": 4}))
    found = exposed(collector)
    assert found['sglang_blocklora:adapter_requests_running{adapter="a"}'] == 2
    assert found['sglang_blocklora:adapter_requests_running{adapter="other"}'] == 7
    assert found['sglang_blocklora:adapter_requests_running{adapter="(base)"}'] == 1
    slots = {key: value for key, value in found.items() if "adapter_slots" in key}
    assert slots == {
        'sglang_blocklora:adapter_slots{kind="adapter",owner="a"}': 7,
        'sglang_blocklora:adapter_slots{kind="kv",owner="a"}': 4,
        'sglang_blocklora:adapter_slots{kind="adapter",owner="other"}': 12,
        'sglang_blocklora:adapter_slots{kind="kv",owner="other"}': 6,
        'sglang_blocklora:adapter_slots{kind="adapter",owner="(base)"}': 0,
        'sglang_blocklora:adapter_slots{kind="kv",owner="(base)"}': 10,
    }
    assert sum(value for key, value in found.items() if key.startswith("sglang_blocklora:slots{")) == 100
    assert sum("adapter_loads_total" in key for key in found) == 2


def test_totals_never_fall_when_adapters_go_and_come_back() -> None:
    collector = AdapterCollector(LabelBudget())
    key = 'sglang_blocklora:adapter_loads_total{adapter="a"}'
    collector.update(facts(a=COUNTS | {"loads": 3}))
    assert exposed(collector)[key] == 3
    collector.update(facts())
    assert exposed(collector)[key] == 3
    collector.update(facts(a=COUNTS | {"loads": 1, "lora_id": "loaded again"}))
    assert exposed(collector)[key] == 4
    collector.update(facts(a=COUNTS | {"loads": 2, "lora_id": "loaded again"}))
    assert exposed(collector)[key] == 5


def test_nothing_is_shown_before_the_first_facts() -> None:
    assert exposed(AdapterCollector(LabelBudget())) == {}


def test_routers_series_names_adapters_in_its_labels() -> None:
    collector = AdapterCollector(LabelBudget(1))
    collector.update(facts(b=COUNTS | {"running": 1}, a=COUNTS | {"running": 1, "waiting": 2}, c=COUNTS))
    names = [key for key in exposed(collector) if key.startswith("vllm:")]
    assert names == ['vllm:lora_requests_info{max_lora="8",running_lora_adapters="a,b",waiting_lora_adapters="a"}']


def adapters(*names: str) -> list[AdapterFacts]:
    return [AdapterFacts(name, "/p", name, False, "host") for name in names]


@pytest.mark.parametrize(
    ("limit", "after", "expected", "more"),
    [(2, None, "ab", True), (2, "b", "c", False), (9, None, "abc", False), (2, "aa", "bc", False), (1, "c", "", False)],
)
def test_pages(limit: int, after: str | None, expected: str, more: bool) -> None:
    body = page(adapters("a", "b", "c"), limit, after)
    assert "".join(one["name"] for one in body["data"]) == expected
    assert (body["has_more"], body["total"]) == (more, 3)
    assert body["last_id"] == (expected[-1] if expected else None)


def test_adapters_that_the_scheduler_put_out_are_on_disk_and_errors_are_told() -> None:
    merged = merge_facts(
        facts(b=COUNTS), [("b", "/p", "id-b", False), ("a", "/q", "id-a", True)], {"a": "gone", "nobody": "x"}
    )
    assert [(one.name, one.tier, one.last_error) for one in merged] == [("a", "disk", "gone"), ("b", "resident", None)]
    assert merged[0].pinned


def test_a_load_that_fails_is_not_counted() -> None:
    counts = LoadCounts()
    with counts.measure("a", 10):
        pass
    with pytest.raises(RuntimeError), counts.measure("a", 10):
        raise RuntimeError
    for tier in ("resident", "host", "disk", "host"):
        counts.arrived("a", tier)
    found = counts.of("a")
    assert (found.loads, found.bytes_copied, found.hits, found.misses, found.host_hits) == (1, 10, 1, 3, 2)
    counts.forget("a")
    assert counts.of("a").loads == 0


class Shared:
    """A pool in which names a and b have the same contents, and contents X lost their name."""

    loaded = MappingProxyType(
        {
            key: SimpleNamespace(name=key, content_hash=contents)
            for key, contents in (("a", "S"), ("b", "S"), ("c", "T"))
        }
    )

    def slot_counts(self) -> SlotCounts:
        return SlotCounts(100, 20, 10, {"S": 8, "X": 4}, {None: 30, "S": 16, "X": 2, "T": 10})


def test_slots_of_all_owners_add_up() -> None:
    slots = slot_facts(Shared())
    assert slots["owners"] == {
        "a": {"adapter": 8, "kv": 16},
        "(unloaded)": {"adapter": 4, "kv": 2},
        "(base)": {"adapter": 0, "kv": 30},
        "c": {"adapter": 0, "kv": 10},
    }
    assert slots["free"] + slots["in_use"] + slots["adapter"] + slots["kv"] == slots["total"]
    assert slots["invalid_kv_share"] == 10 / 58, "T is not resident"


def test_owners_of_slots_are_those_who_wrote_last() -> None:
    owners = SlotOwners(12, "cpu")
    owners.wrote("A", torch.tensor([1, 2, 3, 4]))
    owners.wrote(None, torch.tensor([4, 5]))
    owners.wrote("B", torch.tensor([2, 9]))
    assert owners.count(torch.tensor([1, 2, 3, 4, 5, 9])) == {"A": 2, None: 2, "B": 2}
    assert owners.count(torch.tensor([2, 9])) == {"B": 2}
    assert owners.count(torch.empty(0, dtype=torch.int64)) == {}
