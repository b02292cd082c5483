"""Paging, labels and totals: what the HTTP process makes of the scheduler's facts."""

from __future__ import annotations

import re
from types import MappingProxyType, SimpleNamespace

import msgspec
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sglang_blocklora.memory.accounting import FORGOTTEN, SlotCounts, SlotOwners
from sglang_blocklora.memory.counts import AdapterCount, AdapterCounts
from sglang_blocklora.memory.durations import Durations
from sglang_blocklora.reporting import exposition
from sglang_blocklora.reporting.facts import (
    AdapterFacts,
    Facts,
    OwnedSlots,
    Requests,
    SlotFacts,
    merge_facts,
    page,
    slot_facts,
)
from sglang_blocklora.reporting.prometheus import AdapterCollector, LabelBudget

SLOTS = SlotFacts(
    total=100,
    free=50,
    in_use=11,
    adapter=19,
    kv=20,
    invalid_kv=5,
    owners={
        "a": OwnedSlots(adapter=7, kv=4),
        "b": OwnedSlots(adapter=7, kv=0),
        "c": OwnedSlots(adapter=5, kv=6),
        "(base)": OwnedSlots(adapter=0, kv=10),
    },
)


def adapter(name: str, lora_id: str | None = None, running: int = 0, waiting: int = 0, **counts: int) -> AdapterFacts:
    return AdapterFacts(
        name=name,
        path="/p",
        lora_id=lora_id or f"id-{name}",
        pinned=False,
        tier="resident",
        slots=7,
        requests=Requests(running=running, waiting=waiting),
        counts=AdapterCount(**counts),
    )


def facts(*adapters: AdapterFacts) -> Facts:
    """Facts of the scheduler."""
    return Facts(adapters=list(adapters), base=Requests(running=1), max_adapters_per_batch=8, slots=SLOTS)


def text(collector: AdapterCollector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def exposed(collector: AdapterCollector) -> dict[str, float]:
    lines = (line for line in text(collector).splitlines() if not line.startswith("#"))
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_labels_are_bounded_and_an_adapter_keeps_its_own() -> None:
    budget = LabelBudget(2)
    names = [budget.label(name) for name in ("a", "b", "c", "a", None, "d", "b")]
    assert names == ["a", "b", "other", "a", "(base)", "other", "b"]


def test_adapters_beyond_the_budget_are_summed() -> None:
    collector = AdapterCollector(LabelBudget(1))
    collector.show(facts(adapter("a", running=2), adapter("b", running=3), adapter("c", running=4)), 0)
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
    collector.show(facts(adapter("a", loads=3)), 0)
    assert exposed(collector)[key] == 3
    collector.show(facts(), 0)
    assert exposed(collector)[key] == 3
    for loads, total in ((1, 4), (1, 4), (2, 5)):  # the same facts again change nothing
        collector.show(facts(adapter("a", "loaded again", loads=loads)), 0)
        assert exposed(collector)[key] == total


def test_two_adapters_of_one_name_are_both_counted() -> None:
    """The older one's last requests run while another is loaded under its name."""
    collector = AdapterCollector(LabelBudget())
    key = 'sglang_blocklora:adapter_hits_total{adapter="a"}'.replace("hits", "resident_hits")
    collector.show(facts(adapter("a", "old", running=2, hits=5)), 0)
    both = facts(adapter("a", "old", running=1, hits=5), adapter("a", "new", running=3, hits=1))
    for one in (both, facts(*reversed(both.adapters))):
        collector.show(one, 0)
        found = exposed(collector)
        assert found[key] == 6
        assert found['sglang_blocklora:adapter_requests_running{adapter="a"}'] == 4
        assert 'vllm:lora_requests_info{max_lora="8",running_lora_adapters="a",waiting_lora_adapters=""}' in found
        listed = merge_facts(one, [("a", "/p", "new", False)], {})
        assert [(told.lora_id, told.requests.running, told.counts.hits) for told in listed] == [("new", 3, 1)]


def test_every_count_is_a_series_and_a_field_of_the_list() -> None:
    """A count that is added to ``AdapterCount`` needs no other line to be told."""
    numbers = {field: 10 + i for i, field in enumerate(AdapterCount.__struct_fields__)}
    collector = AdapterCollector(LabelBudget())
    collector.show(facts(adapter("a", **numbers)), 2.5)
    families = {family.name: family for family in text_string_to_metric_families(text(collector))}
    totals = [one for one in families.values() if one.type == "counter"]
    assert sorted(one.samples[0].value for one in totals) == sorted(numbers.values())
    assert all(one.documentation for one in families.values())
    assert families["sglang_blocklora:facts_age_seconds"].samples[0].value == 2.5
    (told,) = page(merge_facts(facts(adapter("a", **numbers)), [("a", "/p", "id-a", False)], {}), 10, None)["data"]
    assert numbers.items() <= told.items()
    assert told["running"] == 0


def test_nothing_is_shown_before_the_first_facts() -> None:
    collector = AdapterCollector(LabelBudget())
    assert exposed(collector) == {}
    collector.show(None, 0)
    assert exposed(collector) == {}


def test_names_with_any_letters_are_told_so_that_prometheus_can_read_them() -> None:
    names = ['a"b', "a\\b", "a\nb", "{}", "é", "a,b"]
    collector = AdapterCollector(LabelBudget())
    collector.show(facts(*(adapter(name, waiting=1) for name in names)), 0)
    families = {family.name: family for family in text_string_to_metric_families(text(collector))}
    waiting = families["sglang_blocklora:adapter_requests_waiting"].samples
    assert {sample.labels["adapter"] for sample in waiting} == {*names, "(base)"}


def test_our_writer_writes_what_prometheus_clients_does() -> None:
    """But for the time, which is the value of one series."""
    names = ["a", 'quo"ted', "back\\slash", "new\nline", "größe ✓", "", "x" * 1000]
    collector = AdapterCollector(LabelBudget(4), 'mo"del')
    counts = [{"loads": 10**7, "load_seconds": 0.1 * i, "bytes_copied": 10**15 + i} for i in range(len(names))]
    ours = [adapter(name, waiting=i, **counts[i]) for i, name in enumerate(names)]
    took = Durations()
    for seconds in (0.002, 0.3, 100.0):
        took.add(seconds)
    collector.show(msgspec.structs.replace(facts(*ours), transitions={"load": took}), age_seconds=1.5e-7)
    written, expected = (
        re.sub(r"(lora_requests_info\{.*\}) \S+", r"\1", page)
        for page in (exposition.text(collector.collect()).decode(), text(collector))
    )
    assert written == expected
    assert len(written.splitlines()) > 100


def test_routers_series_names_adapters_in_its_labels() -> None:
    collector = AdapterCollector(LabelBudget(1))
    collector.show(facts(adapter("b", running=1), adapter("a", running=1, waiting=2), adapter("c")), 0)
    names = [key for key in exposed(collector) if key.startswith("vllm:lora_requests_info")]
    assert names == ['vllm:lora_requests_info{max_lora="8",running_lora_adapters="a,b",waiting_lora_adapters="a"}']


@pytest.mark.parametrize(
    ("limit", "after", "expected", "more"),
    [(2, None, "ab", True), (2, "b", "c", False), (9, None, "abc", False), (2, "aa", "bc", False), (1, "c", "", False)],
)
def test_pages(limit: int, after: str | None, expected: str, more: bool) -> None:
    body = page([adapter(name) for name in "abc"], limit, after)
    assert "".join(one["name"] for one in body["data"]) == expected
    assert (body["has_more"], body["total"]) == (more, 3)
    assert body["last_id"] == (expected[-1] if expected else None)


def test_adapters_that_the_scheduler_put_out_are_on_disk_and_errors_are_told() -> None:
    known = [("b", "/p", "id-b", False), ("a", "/q", "id-a", True), ("c", "/r", None, False)]
    merged = merge_facts(facts(adapter("b")), known, {"a": "gone", "nobody": "x"})
    assert [(one.name, one.tier, one.last_error) for one in merged] == [
        ("a", "disk", "gone"),
        ("b", "resident", None),
        ("c", "disk", None),
    ]
    assert merged[0].pinned


def test_a_load_that_fails_is_not_counted() -> None:
    counts = AdapterCounts()
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
        kv = {None: 30, "S": 16, "X": 2, "T": 10}
        return SlotCounts(total=100, free=20, in_use=10, adapters={"S": 8, "X": 4}, kv=kv)


def test_slots_of_all_owners_add_up() -> None:
    slots = slot_facts(Shared())
    assert slots.owners == {
        "a": OwnedSlots(adapter=8, kv=16),
        "(unloaded)": OwnedSlots(adapter=4, kv=2),
        "(base)": OwnedSlots(adapter=0, kv=30),
        "c": OwnedSlots(adapter=0, kv=10),
    }
    assert slots.free + slots.in_use + slots.adapter + slots.kv == slots.total
    assert slots.invalid_kv_share == 10 / 58, "T is not resident"


def test_owners_of_slots_are_those_who_wrote_last() -> None:
    owners = SlotOwners(12, "cpu")
    owners.wrote_weights("A", torch.tensor([1, 2, 3, 4]))
    owners.wrote_kv(None, torch.tensor([4, 5]))
    owners.wrote_kv("B", torch.tensor([2, 9]))
    assert owners.count(torch.tensor([1, 2, 3, 4, 5, 9])) == ({"A": 2}, {None: 2, "B": 2})
    assert owners.count(torch.tensor([2, 9])) == ({}, {"B": 2})
    assert owners.count(torch.empty(0, dtype=torch.int64)) == ({}, {})


def test_an_owners_number_is_used_again_and_what_it_left_is_nobodys() -> None:
    owners = SlotOwners(12, "cpu")
    owners.wrote_weights("A", torch.tensor([1, 2]))
    owners.wrote_kv("A", torch.tensor([3]))
    owners.forget("A")
    assert owners.count(torch.tensor([1, 2, 3])) == ({FORGOTTEN: 2}, {FORGOTTEN: 1})
    for i in range(10_000):
        owners.wrote_weights(f"{i}", torch.tensor([1, 2]))
        owners.forget(f"{i}")
    owners.wrote_kv("B", torch.tensor([3]))
    assert owners.count(torch.tensor([3])) == ({}, {"B": 1})
    assert len(owners._numbers) + len(owners._unused) <= 3
