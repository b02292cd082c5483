"""How often each adapter was asked for, and brought into the arena."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class LoadCount:
    """loads         times the adapter was brought into the arena
    seconds       of host time over all loads; on a GPU the copy itself goes on beside it
    hits, misses  requests that found it resident when they arrived, or not
    """

    loads: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0


class LoadCounts:
    """Counts for reports only: they differ between TP ranks, so nothing may be decided by them."""

    def __init__(self) -> None:
        self._counts: dict[str, LoadCount] = {}

    @contextmanager
    def measure(self, key: str) -> Iterator[None]:
        """Count one load, unless it raises."""
        started = time.perf_counter()
        yield
        count = self._own(key)
        count.loads += 1
        count.seconds += time.perf_counter() - started

    def arrived(self, key: str, resident: bool) -> None:
        """Count one request."""
        count = self._own(key)
        if resident:
            count.hits += 1
        else:
            count.misses += 1

    def _own(self, key: str) -> LoadCount:
        return self._counts.setdefault(key, LoadCount())

    def of(self, key: str) -> LoadCount:
        return self._counts.get(key, LoadCount())

    def forget(self, key: str) -> None:
        self._counts.pop(key, None)
