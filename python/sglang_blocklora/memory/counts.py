"""Counts how often each adapter was asked for, brought into the arena and put out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec

from sglang_blocklora.memory.durations import Durations


def _series(name: str, text: str) -> msgspec.Meta:
    return msgspec.Meta(title=name, description=text)


class AdapterCount(msgspec.Struct, kw_only=True):
    """What happened to one adapter since it was loaded: numbers that grow, each of them a series on ``/metrics``.

    A new count is one field here, with its series and text, and a line that adds to it.
    """

    loads: Annotated[int, _series("loads", "Times an adapter was brought into the arena.")] = 0
    load_seconds: Annotated[float, _series("load_seconds", "Host time spent on that; a GPU copies beside it.")] = 0.0
    bytes_copied: Annotated[int, _series("copied_bytes", "Bytes copied to the arena of TP rank 0.")] = 0
    disk_reads: Annotated[
        int, _series("disk_reads", "Loads that read the adapter's folder again: host memory did not hold it.")
    ] = 0
    host_evictions: Annotated[int, _series("host_evictions", "Times an adapter gave way in host memory.")] = 0
    hits: Annotated[int, _series("resident_hits", "Requests that found their adapter resident when they arrived.")] = 0
    misses: Annotated[int, _series("misses", "Requests that did not find it resident.")] = 0
    host_hits: Annotated[int, _series("host_hits", "Of those, requests that found it in host memory.")] = 0
    evictions: Annotated[int, _series("evictions", "Times an adapter was put out of the arena.")] = 0
    not_activated: Annotated[
        int, _series("not_activated", "Requests of an activated adapter whose prompt did not hold its invocation.")
    ] = 0


class AdapterCounts:
    """The counts of all adapters, for reports only: they differ between TP ranks, so nothing may be decided by them.

    durations  of loads into the arena
    """

    def __init__(self) -> None:
        self.durations = Durations()
        self._counts: dict[str, AdapterCount] = {}

    @contextmanager
    def measure(self, key: str, size_bytes: int) -> Iterator[None]:
        """Count one load of ``size_bytes`` into the arena, unless it raises."""
        started = time.perf_counter()
        yield
        count = self._own(key)
        count.loads += 1
        seconds = time.perf_counter() - started
        count.load_seconds += seconds
        self.durations.add(seconds)
        count.bytes_copied += size_bytes

    def read_from_disk(self, key: str) -> None:
        """Count one image that was read again."""
        self._own(key).disk_reads += 1

    def evicted_from_host(self, key: str) -> None:
        """Count one image that gave way in host memory."""
        self._own(key).host_evictions += 1

    def arrived(self, key: str, tier: str) -> None:
        """Count one request that found its adapter in ``tier``: "resident", "host" or "disk"."""
        count = self._own(key)
        count.hits += tier == "resident"
        count.misses += tier != "resident"
        count.host_hits += tier == "host"

    def not_activated(self, key: str) -> None:
        """Count one request that the base model answers: its prompt does not activate the adapter."""
        self._own(key).not_activated += 1

    def evicted(self, key: str) -> None:
        """Count one time that an adapter was put out of the arena."""
        self._own(key).evictions += 1

    def _own(self, key: str) -> AdapterCount:
        return self._counts.setdefault(key, AdapterCount())

    def of(self, key: str) -> AdapterCount:
        return self._counts.get(key, AdapterCount())

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)
