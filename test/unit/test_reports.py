"""Paging, labels and totals: what the HTTP process makes of the scheduler's facts."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sglang_blocklora.memory.load_counts import LoadCounts
from sglang_blocklora.metrics import AdapterCollector, LabelBudget
from sglang_blocklora.reports import AdapterFacts, merge_facts, page


def facts(**adapters: dict[str, Any]) -> dict[str, Any]:
    """Facts of the scheduler for adapters of these names."""
    plain = {"path": "/p", "pinned": False, "tier": "resident", "slots": 7}
    return {
        "adapters": [{"name": name, "lora_id": f"id-{name}"} | plain | own for name, own in adapters.items()],
        "base": {"running": 1, "waiting": 0},
        "max_adapters_per_batch": 8,
    }


def exposed(collector: AdapterCollector) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(collector)
    lines = (line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#"))
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


COUNTS = {"running": 0, "waiting": 0, "loads": 0, "load_seconds": 0.0, "evictions": 0}


def test_labels_are_bounded_and_an_adapter_keeps_its_own() -> None:
    budget = LabelBudget(2)
    names = [budget.label(name) for name in ("a", "b", "c", "a", None, "d", "b")]
    assert names == ["a", "b", "other", "a", "(base)", "other", "b"]


def test_adapters_beyond_the_budget_are_summed() -> None:
    collector = AdapterCollector(LabelBudget(1))
    collector.update(facts(a=COUNTS | {"running": 2}, b=COUNTS | {"running": 3}, c=COUNTS | {"running": 4, "slots": 5}))
    found = exposed(collector)
    assert found['sglang_blocklora:adapter_requests_running{adapter="a"}'] == 2
    assert found['sglang_blocklora:adapter_requests_running{adapter="other"}'] == 7
    assert found['sglang_blocklora:adapter_requests_running{adapter="(base)"}'] == 1
    assert found['sglang_blocklora:adapter_slots{owner="other"}'] == 12
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
    with counts.measure("a"):
        pass
    with pytest.raises(RuntimeError), counts.measure("a"):
        raise RuntimeError
    counts.arrived("a", resident=True)
    assert (counts.of("a").loads, counts.of("a").hits, counts.of("a").misses) == (1, 1, 0)
    counts.forget("a")
    assert counts.of("a").loads == 0
