"""Shows facts and requests as Prometheus series per adapter.

Import it only once ``PROMETHEUS_MULTIPROC_DIR`` is set, as SGLang's own metrics.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping

import msgspec
from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang_blocklora.memory.counts import AdapterCount
from sglang_blocklora.reporting.facts import BASE, UNLOADED, Facts, OwnedSlots, SlotFacts, added
from sglang_blocklora.reporting.routers import routers_series

# Labels are never given up again, so that no counter jumps; adapters beyond them share "other".
MAX_LABELS = 100
OTHER_LABEL = "other"
PREFIX = "sglang_blocklora:"
# Field of ``AdapterCount`` -> what its series is called and tells.
SERIES: dict[str, msgspec.Meta] = {
    field: hint.__metadata__[0] for field, hint in typing.get_type_hints(AdapterCount, include_extras=True).items()
}
TTFT_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 6, 10, 20, 40, 80)


class LabelBudget:
    """Gives label values to adapters: the first ones their names, all others ``other``."""

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
    """Counts requests and tokens in the HTTP process. At most one per process: its series are global."""

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
    """Makes series from the scheduler's facts when they are scraped, one for each field of ``AdapterCount``.

    model_name  the served name of the base model
    """

    def __init__(self, budget: LabelBudget, model_name: str = "") -> None:
        self._budget = budget
        self._model_name = model_name
        self._facts: Facts | None = None
        self._age_seconds = 0.0
        self._last: dict[str | None, AdapterCount] = {}
        self._totals: dict[str, AdapterCount] = {}

    def show(self, facts: Facts | None, age_seconds: float) -> None:
        """Take facts, None where there are none yet. Totals outlive the adapters they count, so they never fall."""
        self._facts, self._age_seconds = facts, age_seconds
        if facts is None:
            return
        for adapter in facts.adapters:
            before = self._last.get(adapter.lora_id, AdapterCount())
            label = self._budget.label(adapter.name)
            if before == adapter.counts and label in self._totals:
                continue
            self._totals[label] = added(self._totals.get(label, AdapterCount()), _gained(before, adapter.counts))
        self._last = {adapter.lora_id: adapter.counts for adapter in facts.adapters}

    def collect(self) -> Iterator[Metric]:
        if self._facts is None:
            return
        yield GaugeMetricFamily(
            f"{PREFIX}facts_age_seconds",
            "Age of what is told below: a scheduler that is busy answers later.",
            self._age_seconds,
        )
        for state in ("running", "waiting"):
            counts = {BASE: getattr(self._facts.base, state)}
            for adapter in self._facts.adapters:
                label = self._budget.label(adapter.name)
                counts[label] = counts.get(label, 0) + getattr(adapter.requests, state)
            yield _gauge(f"{PREFIX}adapter_requests_{state}", f"Requests {state}.", "adapter", counts)
        yield from self._slots(self._facts.slots)
        for field, about in SERIES.items():
            family = CounterMetricFamily(f"{PREFIX}adapter_{about.title}", str(about.description), labels=["adapter"])
            for label, count in self._totals.items():
                family.add_metric([label], getattr(count, field))
            yield family
        yield from routers_series(self._facts, self._model_name)

    def _slots(self, slots: SlotFacts) -> Iterator[Metric]:
        owned: dict[str, OwnedSlots] = {}
        for owner, count in slots.owners.items():
            label = owner if owner in (BASE, UNLOADED) else self._budget.label(owner)
            owned[label] = added(owned.get(label, OwnedSlots()), count)
        family = GaugeMetricFamily(
            f"{PREFIX}adapter_slots",
            "Slots of the arena that adapters' weights and their KV hold.",
            labels=["owner", "kind"],
        )
        for label, count in owned.items():
            family.add_metric([label, "adapter"], count.adapter)
            family.add_metric([label, "kv"], count.kv)
        yield family
        states = {state: getattr(slots, state) for state in ("free", "in_use", "adapter", "kv")}
        yield _gauge(f"{PREFIX}slots", "All slots of the arena.", "state", states)
        yield GaugeMetricFamily(
            f"{PREFIX}invalid_kv_share", "Share of cached KV whose adapter is not resident.", slots.invalid_kv_share
        )


def _gained(before: AdapterCount, now: AdapterCount) -> AdapterCount:
    """What was counted since; a count that fell was begun anew."""
    return AdapterCount(**{field: max(0, getattr(now, field) - getattr(before, field)) for field in SERIES})


def _gauge(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
