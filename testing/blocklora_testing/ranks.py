"""Two TP ranks in one process, whose reads end when the test says so, as TP rank 0's decisions do in a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sglang_blocklora.adapters.loading import Found, LocalShard, Report, merge
from sglang_blocklora.memory.reads import Decision

Rank = TypeVar("Rank")


class HandReads:
    """The reads of one TP rank (``memory.reads.Reads``): done at once, and decided by ``Ranks.arrive``."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str, Found]] = {}
        self._count = 0

    def start(self, name: str, path: str, run: Callable[[], Found]) -> int:
        self._count += 1
        self.found[self._count] = (name, path, run())
        return self._count

    def finish(self, decision: Decision) -> LocalShard | None:
        local = self.found.pop(decision.number)[2][1]
        return local if decision.report.error is None else None


class Ranks(Generic[Rank]):
    """Two objects, one per TP rank; ``make(rank, reads)`` makes one."""

    def __init__(self, make: Callable[[int, HandReads], Rank]) -> None:
        self.reads = [HandReads(), HandReads()]
        self.objects = [make(rank, reads) for rank, reads in enumerate(self.reads)]

    def call(self, action: Callable[[Rank], Any]) -> Any:
        """What ``action`` gives on both ranks; they must agree."""
        first, second = map(action, self.objects)
        assert first == second, "the TP ranks disagree"
        return first

    def decide(self, number: int) -> Decision:
        """What TP rank 0 makes of a read that is done on both."""
        name, path, _ = self.reads[0].found[number]
        reports: list[Report] = [reads.found[number][2][0] for reads in self.reads]
        return Decision(number=number, report=merge(name, path, reports))

    def arrive(self, arrived: Callable[[Rank, Decision], Any], *numbers: int) -> None:
        """Both ranks learn what became of these reads, or of all that go on, in the order in which they began."""
        assert self.reads[0].found.keys() == self.reads[1].found.keys(), "the TP ranks read different adapters"
        for decision in [self.decide(number) for number in numbers or tuple(self.reads[0].found)]:
            self.call(lambda rank, decision=decision: arrived(rank, decision))
