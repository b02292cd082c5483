"""TP ranks as threads of one process, which exchange outcomes as a TP group does: together or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from sglang_blocklora.adapters.loading import Outcome

# A rank that waits this long for another one would wait for ever in a server.
TIMEOUT_SECONDS = 20
Rank = TypeVar("Rank")


class Ranks(Generic[Rank]):
    """Two objects, one per TP rank; ``make(rank, exchange)`` makes one."""

    def __init__(self, make: Callable[[int, Callable[[Outcome], Sequence[Outcome]]], Rank]) -> None:
        self._told: list[Outcome] = [Outcome(None, 0)] * 2
        self._barrier = threading.Barrier(2)
        self._threads = ThreadPoolExecutor(2)
        self.objects = [make(rank, lambda outcome, rank=rank: self._exchange(rank, outcome)) for rank in range(2)]

    def _exchange(self, rank: int, outcome: Outcome) -> list[Outcome]:
        self._told[rank] = outcome.to_tell()
        self._barrier.wait(TIMEOUT_SECONDS)
        told = list(self._told)
        self._barrier.wait(TIMEOUT_SECONDS)
        return told

    def call(self, action: Callable[[Rank], Any]) -> Any:
        """What ``action`` gives, on both ranks at once; they must agree. ``BrokenBarrierError`` where one waits."""
        first, second = list(self._threads.map(action, self.objects, timeout=2 * TIMEOUT_SECONDS))
        assert first == second, "the TP ranks disagree"
        return first
