"""Chooses which idle adapters stay while KV is evicted, over logical time, so that all TP ranks choose alike.

The radix tree evicts leaves in SGLang's own order, and an adapter is a leaf once no KV stands behind it. A strategy
only says which adapters are protected from that, and in which order they are given up where KV alone is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

# Counts are halved every so many arrivals (of all requests), which is TinyLFU's reset: what is popular may change.
HALVING_ARRIVALS = 1024
FORGOTTEN_BELOW = 2.0**-6

# What copying one slot from host memory costs, in tokens of prefill: slot bytes / link speed over FLOP / FLOP rate of
# one token. Llama-3.1-8B, bfloat16: 128 KiB at 25 GB/s is 5.2 us, 16 GFLOP at 400 TFLOP/s are 40 us. TP cancels.
COPY_TOKENS_PER_SLOT = 0.13


class EvictionStrategy(Protocol):
    """Chooses the adapters to protect. Nothing but the order of calls and their arguments may count.

    Adapters are named by their content hash."""

    def arrived(self, adapter: str | None, kv_hit: Callable[[], int]) -> None:
        """Note one request, of ``adapter`` or the base model; ``kv_hit`` looks up how much of its KV is cached."""

    def protected(self, resident: Mapping[str, int], kv_slots: int) -> list[str]:
        """Adapters to protect while KV is evicted, in the order in which they may be given up.

        resident  slots of each resident adapter, in order of loading
        kv_slots  slots of cached KV
        """


class Arrivals:
    """Counts who asked, and how often of late. Time is the number of arrivals.

    Halving keeps counts dyadic: sums and products are exact, on every machine.
    """

    def __init__(self) -> None:
        self.now = 0
        self.kv_hits = 0.0
        self._total = 0.0
        self._counts: dict[str, float] = {}
        self._last: dict[str, int] = {}

    def note(self, adapter: str | None, kv_hit: int = 0) -> None:
        """One request came, and ``kv_hit`` of its tokens were cached."""
        self.now += 1
        self._total += 1
        self.kv_hits += kv_hit
        if adapter is not None:
            self._counts[adapter] = self._counts.get(adapter, 0.0) + 1
            self._last[adapter] = self.now
        if self.now % HALVING_ARRIVALS == 0:
            self._halve()

    def last(self, adapter: str) -> int:
        """Number of the latest arrival for ``adapter``, 0 where it is forgotten."""
        return self._last.get(adapter, 0)

    def rate(self, adapter: str) -> float:
        """Expected share of arrivals that ask for ``adapter``."""
        return self._counts.get(adapter, 0.0) / max(self._total, 1.0)

    def kv_hit_rate(self) -> float:
        """Expected tokens of cached KV that an arrival finds."""
        return self.kv_hits / max(self._total, 1.0)

    def _halve(self) -> None:
        self._total /= 2
        self.kv_hits /= 2
        self._counts = {key: count / 2 for key, count in self._counts.items() if count / 2 >= FORGOTTEN_BELOW}
        self._last = {key: self._last[key] for key in self._counts}


class LRU:
    """SGLang's order among all leaves, adapters too: an adapter is as recent as the KV that stood behind it."""

    def arrived(self, adapter: str | None, kv_hit: Callable[[], int]) -> None:
        pass

    def protected(self, resident: Mapping[str, int], kv_slots: int) -> list[str]:
        return []


class KVFirst:
    """All KV that is not in use goes before any adapter; then adapters go, the least recently asked for first."""

    def __init__(self) -> None:
        self._arrivals = Arrivals()

    def arrived(self, adapter: str | None, kv_hit: Callable[[], int]) -> None:
        self._arrivals.note(adapter)

    def protected(self, resident: Mapping[str, int], kv_slots: int) -> list[str]:
        return sorted(resident, key=self._arrivals.last)


class CostAware:
    """Hold the adapters that are worth more per slot than the cached KV; give up the cheapest first.

    Worth per slot = expected reuse per arrival x cost to bring back / slots, in tokens of prefill. An adapter: its
    share of arrivals x the copy. KV: the tokens that an arrival finds cached, each of which is one token to compute.
    """

    def __init__(self, copy_tokens_per_slot: float = COPY_TOKENS_PER_SLOT) -> None:
        self._copy_tokens_per_slot = copy_tokens_per_slot
        self._arrivals = Arrivals()

    def arrived(self, adapter: str | None, kv_hit: Callable[[], int]) -> None:
        self._arrivals.note(adapter, kv_hit())

    def protected(self, resident: Mapping[str, int], kv_slots: int) -> list[str]:
        kv_worth = self._arrivals.kv_hit_rate() / max(kv_slots, 1)
        worth = {adapter: self._arrivals.rate(adapter) * self._copy_tokens_per_slot for adapter in resident}
        return sorted((adapter for adapter in resident if worth[adapter] > kv_worth), key=worth.__getitem__)


STRATEGIES: dict[str, Callable[[], EvictionStrategy]] = {"lru": LRU, "kv-first": KVFirst, "cost-aware": CostAware}
# The better of the other two in every workload of research/memory.py (docs/memory.md).
DEFAULT_STRATEGY = "cost-aware"
