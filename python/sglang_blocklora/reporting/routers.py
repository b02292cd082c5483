"""Shows routers which adapters a server has, in vLLM's words: names, labels and values are theirs.

Two generations: ``lora_requests_info``, which tells of requests, and the residency series of vLLM's pull request 54830,
as llm-d's endpoint picker reads them (docs/routers.md). Names are not bounded here: a router looks for each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from sglang_blocklora.reporting.facts import AdapterFacts, Facts

# Our tiers, best first, in their words; an adapter on disk is not loaded to them.
LEVELS = {"resident": "gpu", "host": "cpu"}


def routers_series(facts: Facts, model_name: str) -> Iterator[Metric]:
    """All series that routers read."""
    yield _requests_info(facts)
    loaded = _loaded(facts)
    family = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "Adapters that are in the arena (gpu) or in host memory (cpu).",
        labels=["adapter_name", "level", "pinned", "rank"],
    )
    for name, one in loaded.items():
        family.add_metric([name, LEVELS[one.tier], str(one.pinned).lower(), str(one.rank or 0)], 1)
    yield family
    resident = sum(one.tier == "resident" for one in loaded.values())
    told = {
        "vllm:num_gpu_loaded_lora_adapters": ("Adapters in the arena.", resident),
        "vllm:max_gpu_lora_adapters": (
            "Adapters that a batch can use, or that are in the arena if they are more.",
            max(facts.max_adapters_per_batch, resident),
        ),
    }
    for series, (text, value) in told.items():
        family = GaugeMetricFamily(series, text, labels=["model_name"])
        family.add_metric([model_name], value)
        yield family
    seconds = HistogramMetricFamily(
        "vllm:lora_adapter_load_seconds",
        "Time to bring an adapter from disk to host memory (load), and from there into the arena (activate).",
        labels=["transition"],
    )
    for transition, durations in facts.transitions.items():
        seconds.add_metric([transition], durations.buckets(), durations.sum_seconds)
    yield seconds


def _loaded(facts: Facts) -> dict[str, AdapterFacts]:
    """Adapters by name that are not only on disk; of two with one name, the one that is nearer."""
    order = [*LEVELS]
    found: dict[str, AdapterFacts] = {}
    for one in facts.adapters:
        other = found.get(one.name)
        if one.tier in LEVELS and (other is None or order.index(one.tier) < order.index(other.tier)):
            found[one.name] = one
    return found


def _requests_info(facts: Facts) -> Metric:
    """The older series: the names are the labels and the value is the time."""
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Running stats on lora requests.",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )
    waiting = {adapter.name for adapter in facts.adapters if adapter.requests.waiting}
    running = {adapter.name for adapter in facts.adapters if adapter.requests.running}
    names = [",".join(sorted(one)) for one in (waiting, running)]
    family.add_metric([str(facts.max_adapters_per_batch), *names], time.time())
    return family
