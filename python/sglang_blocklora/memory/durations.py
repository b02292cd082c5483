"""Counts how long something took, by bounds, so that replicas can be added up and a histogram be told."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_NAMES = [*(f"{bound:g}" for bound in BOUNDS_SECONDS), "+Inf"]


class Durations(msgspec.Struct, kw_only=True):
    """How often something took at most so long and longer than the bound before, and seconds of all together."""

    counts: dict[str, int] = {}
    sum_seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        name = _NAMES[bisect_left(BOUNDS_SECONDS, seconds)]
        self.counts[name] = self.counts.get(name, 0) + 1
        self.sum_seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus's buckets: each bound and how many took at most so long."""
        found, so_far = [], 0
        for name in _NAMES:
            so_far += self.counts.get(name, 0)
            found.append((name, float(so_far)))
        return found
