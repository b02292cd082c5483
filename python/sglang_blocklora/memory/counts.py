"""How often each adapter was asked for, and brought into the arena."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class LoadCount:
    """loads           times the adapter was brought into the arena
    seconds         of host time over all loads; on a GPU the copy itself goes on beside it
    bytes_copied    to the arena of this TP rank, over all loads
    disk_reads      times its image was read from disk again, because host memory did not hold it
    evictions       times it was put out of the arena
    host_evictions  times its image gave way in host memory
    hits, misses    requests that found it resident when they arrived, or not
    host_hits       of the misses, those that found it in host memory
    """

    loads: int = 0
    seconds: float = 0.0
    bytes_copied: int = 0
    disk_reads: int = 0
    host_evictions: int = 0
    hits: int = 0
    misses: int = 0
    host_hits: int = 0
    evictions: int = 0


class LoadCounts:
    """Counts for reports only: they differ between TP ranks, so nothing may be decided by them."""

    def __init__(self) -> None:
        self._counts: dict[str, LoadCount] = {}

    @contextmanager
    def measure(self, key: str, size_bytes: int) -> Iterator[None]:
        """Count one load of ``size_bytes`` into the arena, unless it raises."""
        started = time.perf_counter()
        yield
        count = self._own(key)
        count.loads += 1
        count.seconds += time.perf_counter() - started
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

    def evicted(self, key: str) -> None:
        """Count one time that an adapter was put out of the arena."""
        self._own(key).evictions += 1

    def _own(self, key: str) -> LoadCount:
        return self._counts.setdefault(key, LoadCount())

    def of(self, key: str) -> LoadCount:
        return self._counts.get(key, LoadCount())

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)
