"""Writes Prometheus's text format for series of ours, of which there are thousands in a scrape.

prometheus_client's writer checks the name of every label for each sample anew, which was most of the time of a scrape
with a thousand adapters. Ours have names that are known to be right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString


def text(metrics: Iterable[Metric]) -> bytes:
    """The same bytes as ``prometheus_client.generate_latest`` of a registry that collects ``metrics``.

    Counters, gauges and histograms without timestamps; names of metrics and labels must be legal ones.
    """
    lines: list[str] = []
    for metric in metrics:
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        lines += f"# HELP {name} {_escaped(metric.documentation, quotes=False)}", f"# TYPE {name} {metric.type}"
        lines += [f"{one.name}{_labels(one.labels)} {_number(one.value)}" for one in metric.samples]
    return "".join(f"{line}\n" for line in lines).encode()


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join([f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())]) + "}"


def _number(value: float) -> str:
    return str(floatToGoString(value))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=4096)
def _escaped(value: str, *, quotes: bool = True) -> str:
    escaped = value.replace("\\", r"\\").replace("\n", r"\n")
    return escaped.replace('"', r"\"") if quotes else escaped
