"""Series that routers read, held to what vLLM's pull request 54830 and llm-d's endpoint picker say of them."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sglang_blocklora.memory.durations import Durations
from sglang_blocklora.reporting.facts import AdapterFacts, Facts, Requests, SlotFacts
from sglang_blocklora.reporting.prometheus import AdapterCollector, LabelBudget
from sglang_blocklora.reporting.replicas import merge_replicas

SLOTS = SlotFacts(total=9, free=9, in_use=0, adapter=0, kv=0, invalid_kv=0, owners={})


def adapter(name: str, tier: str, *, pinned: bool = False, rank: int = 8, lora_id: str = "") -> AdapterFacts:
    lora_id = lora_id or f"id-{name}"
    return AdapterFacts(name=name, path="/p", lora_id=lora_id, pinned=pinned, tier=tier, rank=rank)


def facts(*adapters: AdapterFacts, limit: int = 4, **others: object) -> Facts:
    return Facts(adapters=[*adapters], base=Requests(), max_adapters_per_batch=limit, slots=SLOTS, **others)


def samples(told: Facts | None) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Name of a series -> its samples, by sorted labels, as Prometheus's parser reads them."""
    collector = AdapterCollector(LabelBudget(1), "base")
    collector.show(told, 0)
    registry = CollectorRegistry()
    registry.register(collector)
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for one in family.samples:
            found.setdefault(one.name, {})[tuple(sorted(one.labels.items()))] = one.value
    return found


def labels(name: str, level: str, pinned: str, rank: str) -> tuple[tuple[str, str], ...]:
    return (("adapter_name", name), ("level", level), ("pinned", pinned), ("rank", rank))


BASE = (("model_name", "base"),)


def test_loaded_adapters_are_told_with_level_pin_and_rank_and_others_are_not() -> None:
    found = samples(facts(adapter("a", "resident", pinned=True), adapter("b", "host", rank=64), adapter("c", "disk")))
    assert found["vllm:lora_adapter_loaded"] == {
        labels("a", "gpu", "true", "8"): 1,
        labels("b", "cpu", "false", "64"): 1,
    }
    assert found["vllm:num_gpu_loaded_lora_adapters"] == {BASE: 1}
    assert found["vllm:max_gpu_lora_adapters"] == {BASE: 4}


def test_counts_are_there_before_any_adapter() -> None:
    """Their presence tells a router that residency is told."""
    found = samples(facts())
    assert found["vllm:num_gpu_loaded_lora_adapters"] == {BASE: 0}
    assert found["vllm:max_gpu_lora_adapters"] == {BASE: 4}
    assert "vllm:lora_adapter_loaded" not in found


def test_two_versions_of_a_name_are_one_series() -> None:
    old, new = adapter("a", "host", lora_id="old"), adapter("a", "resident", lora_id="new")
    for both in (facts(old, new), facts(new, old)):
        assert samples(both)["vllm:lora_adapter_loaded"] == {labels("a", "gpu", "false", "8"): 1}


def test_more_resident_adapters_than_a_batch_can_use_are_no_overflow() -> None:
    found = samples(facts(*(adapter(name, "resident") for name in "abcdef")))
    assert found["vllm:num_gpu_loaded_lora_adapters"] == found["vllm:max_gpu_lora_adapters"] == {BASE: 6}
    assert len(found["vllm:lora_adapter_loaded"]) == 6, "a router looks for each name"


def test_load_seconds_are_a_histogram_of_both_transitions_over_all_replicas() -> None:
    load, activate = Durations(), Durations()
    for seconds in (0.2, 0.25, 4.0, 100.0):
        load.add(seconds)
    activate.add(0.002)
    one = facts(transitions={"load": load, "activate": activate})
    one = msgspec.convert(msgspec.to_builtins(one), Facts)  # as it travels
    found = samples(merge_replicas([one, one]))
    buckets = found["vllm:lora_adapter_load_seconds_bucket"]
    told = {dict(key)["le"]: value for key, value in buckets.items() if ("transition", "load") in key}
    assert {bound: told[bound] for bound in ("0.1", "0.25", "2.5", "5", "30", "+Inf")} == {
        "0.1": 0,
        "0.25": 4,
        "2.5": 4,
        "5": 6,
        "30": 6,
        "+Inf": 8,
    }
    count = found["vllm:lora_adapter_load_seconds_count"]
    assert count == {(("transition", "load"),): 8, (("transition", "activate"),): 2}
    assert found["vllm:lora_adapter_load_seconds_sum"][("transition", "load"),] == 2 * 104.45
