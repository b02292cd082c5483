"""Prometheus series per adapter. Import it only once ``PROMETHEUS_MULTIPROC_DIR`` is set, as SGLang's own metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang_blocklora.reporting.facts import BASE, UNLOADED

# Labels are never given up again, so that no counter jumps; adapters beyond them share "other".
MAX_LABELS = 100
OTHER_LABEL = "other"
PREFIX = "sglang_blocklora:"
TTFT_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 10, 20, 40, 80)


class LabelBudget:
    """A bounded number of adapters, those used first, under their own names."""

    def __init__(self, size: int = MAX_LABELS) -> None:
        self._size = size
        self._names: set[str] = set()

    def label(self, adapter: str | None) -> str:
        """The ``adapter`` label of ``adapter``; None is the base model."""
        if adapter is None:
            return BASE
        if adapter not in self._names:
            if len(self._names) >= self._size:
                return OTHER_LABEL
            self._names.add(adapter)
        return adapter


class RequestMetrics:
    """What the HTTP process counts as requests go by. At most one per process: its series are global."""

    def __init__(self, budget: LabelBudget) -> None:
        self._budget = budget
        labels = ("adapter",)
        self._requests = Counter(f"{PREFIX}adapter_requests_total", "Finished requests.", labels)
        self._prompt = Counter(f"{PREFIX}adapter_prompt_tokens_total", "Prompt tokens of finished requests.", labels)
        self._hits = Counter(
            f"{PREFIX}adapter_prefix_hit_tokens_total", "Prompt tokens that were found in the cache.", labels
        )
        self._generated = Counter(f"{PREFIX}adapter_generation_tokens_total", "Generated tokens.", labels)
        self._ttft = Histogram(
            f"{PREFIX}adapter_time_to_first_token_seconds",
            "Time to first token, queueing included.",
            labels,
            buckets=TTFT_BUCKETS_SECONDS,
        )

    def first_token(self, adapter: str | None, seconds: float) -> None:
        self._ttft.labels(self._budget.label(adapter)).observe(seconds)

    def finished(self, adapter: str | None, prompt_tokens: int, cached_tokens: int, generated_tokens: int) -> None:
        label = self._budget.label(adapter)
        self._requests.labels(label).inc()
        self._prompt.labels(label).inc(prompt_tokens)
        self._hits.labels(label).inc(cached_tokens)
        self._generated.labels(label).inc(generated_tokens)


class AdapterCollector(Collector):
    """Series made from the scheduler's facts (``reports.pool_facts``) when they are scraped."""

    TOTALS = (
        ("loads", "adapter_loads", "Times an adapter was brought into the arena."),
        ("load_seconds", "adapter_load_seconds", "Host time spent on that."),
        ("evictions", "adapter_evictions", "Times an adapter was put out of the arena."),
        ("hits", "adapter_resident_hits", "Requests that found their adapter resident when they arrived."),
        ("host_hits", "adapter_host_hits", "Requests that found it in host memory only."),
        ("misses", "adapter_misses", "Requests that did not find it resident."),
        ("bytes_copied", "adapter_copied_bytes", "Bytes copied to the arena of TP rank 0."),
        (
            "disk_reads",
            "adapter_disk_reads",
            "Loads that read the adapter's folder again: host memory did not hold it.",
        ),
        ("host_evictions", "adapter_host_evictions", "Times an adapter gave way in host memory."),
    )

    def __init__(self, budget: LabelBudget) -> None:
        self._budget = budget
        self._facts: Mapping[str, Any] | None = None
        self._last: dict[tuple[str, str], float] = {}
        self._totals: dict[str, dict[str, float]] = {key: {} for key, _, _ in self.TOTALS}

    def update(self, facts: Mapping[str, Any]) -> None:
        """Take new facts. Totals outlive the adapters they count, so they never fall."""
        self._facts = facts
        last = {}
        for adapter in facts["adapters"]:
            label = self._budget.label(adapter["name"])
            for key, totals in self._totals.items():
                last[adapter["lora_id"], key] = value = adapter[key]
                gained = value - self._last.get((adapter["lora_id"], key), 0)
                totals[label] = totals.get(label, 0) + max(0, gained)
        self._last = last

    def collect(self) -> Iterator[Metric]:
        if self._facts is None:
            return
        adapters = self._facts["adapters"]
        for state in ("running", "waiting"):
            counts = {BASE: self._facts["base"][state]}
            for adapter in adapters:
                label = self._budget.label(adapter["name"])
                counts[label] = counts.get(label, 0) + adapter[state]
            yield _gauge(f"{PREFIX}adapter_requests_{state}", f"Requests {state}.", "adapter", counts)
        yield from self._slots(self._facts["slots"])
        for key, name, text in self.TOTALS:
            family = CounterMetricFamily(PREFIX + name, text, labels=["adapter"])
            for label, value in self._totals[key].items():
                family.add_metric([label], value)
            yield family
        yield self._lora_requests_info(adapters)

    def _slots(self, slots: Mapping[str, Any]) -> Iterator[Metric]:
        owned: dict[tuple[str, str], int] = {}
        for owner, kinds in slots["owners"].items():
            label = owner if owner in (BASE, UNLOADED) else self._budget.label(owner)
            for kind, count in kinds.items():
                owned[label, kind] = owned.get((label, kind), 0) + count
        family = GaugeMetricFamily(
            f"{PREFIX}adapter_slots",
            "Slots of the arena that adapters' weights and their KV hold.",
            labels=["owner", "kind"],
        )
        for labels, count in owned.items():
            family.add_metric(labels, count)
        yield family
        states = {state: slots[state] for state in ("free", "in_use", "adapter", "kv")}
        yield _gauge(f"{PREFIX}slots", "All slots of the arena.", "state", states)
        yield GaugeMetricFamily(
            f"{PREFIX}invalid_kv_share", "Share of cached KV whose adapter is not resident.", slots["invalid_kv_share"]
        )

    def _lora_requests_info(self, adapters: list[Mapping[str, Any]]) -> Metric:
        """vLLM's series, which routers read: the names are the labels and the value is the time."""
        assert self._facts is not None
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        running, waiting = (
            ",".join(sorted(adapter["name"] for adapter in adapters if adapter[state]))
            for state in ("running", "waiting")
        )
        family.add_metric([str(self._facts["max_adapters_per_batch"]), waiting, running], time.time())
        return family


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
