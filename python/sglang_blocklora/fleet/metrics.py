"""What a front tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from sglang_blocklora.fleet.replicas import Fleet, Replica

PREFIX = "sglang_blocklora:route_"


class Metrics(Collector):
    """Counts of a front, and the state of its ``fleet`` at a scrape."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}requests_total",
            "Requests by replica and how that ended: answered; gone (before a byte came) and unavailable (it said so), "
            "both tried elsewhere; broken (in the middle of a stream).",
            ("replica", "outcome"),
            registry=self._registry,
        )
        self._registry.register(self)

    def count(self, replica: Replica, outcome: str) -> None:
        """A request to ``replica`` ended."""
        self._requests.labels(replica.url, outcome).inc()

    def collect(self) -> Iterator[Metric]:
        for name, told, value in (
            ("up", "Whether a replica answers.", lambda one: one.up),
            ("requests_in_flight", "Requests of this front on a replica.", lambda one: one.in_flight),
            ("owed_adapters", "Adapters that a replica does not have as the others do.", lambda one: len(one.owed)),
        ):
            family = GaugeMetricFamily(f"{PREFIX}{name}", told, labels=["replica"])
            for replica in self._fleet.replicas:
                family.add_metric([replica.url], value(replica))
            yield family

    def page(self) -> tuple[bytes, str]:
        """The page of metrics and its type: the text format, whose names keep their colons."""
        encode, content_type = choose_encoder("")
        return encode(self._registry), content_type
