"""What a name may mean at a time: what an answer may be when names, folders and requests change at once."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

# A folder that came back: requests that waited with one that met the harm share its refusal.
GRACE_S = 5.0
# Nothing is asked about longer ago than this.
MEMORY_S = 300.0


@dataclass
class Span:
    """Contents under a name. Requests between ``ready`` and ``leaving`` must be answered, with these contents.

    Those that overlap [since, ready) or [leaving, until) may be answered so, or refused.
    """

    contents: str
    since: float
    ready: float = inf
    leaving: float = inf
    until: float = inf


class Ledger:
    """What was done to names and folders, with the client's clock: before a call was sent and after it was answered."""

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = defaultdict(list)
        self._harm: dict[str | None, list[list[float]]] = defaultdict(list)  # None: every name
        self._storms: list[list[float]] = []

    def names(self) -> list[str]:
        """Names that a request may be sent to, by name."""
        return sorted(self._spans)

    def newest(self, name: str) -> Span:
        return self._spans[name][-1]

    def coming(self, name: str, contents: str) -> Span:
        """A load is about to be sent."""
        span = Span(contents, time.monotonic())
        self._spans[name] = [old for old in self._spans[name] if old.until > span.since - MEMORY_S]
        self._spans[name].append(span)
        return span

    def there(self, name: str, contents: str) -> None:
        """Loaded before anything else happened."""
        self._spans[name].append(Span(contents, -inf, -inf))

    def possible(self, name: str, begin: float, end: float) -> set[str]:
        """Contents that a request in [begin, end] may be answered with."""
        return {span.contents for span in self._spans[name] if span.since <= end and span.until >= begin}

    def must_answer(self, name: str, begin: float, end: float) -> bool:
        """Whether a refusal of a request in [begin, end] would be wrong."""
        sure = any(span.ready <= begin and end <= span.leaving for span in self._spans[name])
        harmed = any(_overlap(harm, begin, end) for who in (name, None) for harm in self._harm[who])
        return sure and not harmed

    @contextlib.contextmanager
    def harm(self, name: str | None) -> Iterator[None]:
        """The folder of ``name`` (None: all of them) is not what it was meanwhile."""
        span = [time.monotonic(), inf]
        self._harm[name].append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic() + GRACE_S

    @contextlib.contextmanager
    def storm(self) -> Iterator[None]:
        """Whoever runs may be aborted meanwhile."""
        span = [time.monotonic(), inf]
        self._storms.append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic()

    def stormy(self, begin: float, end: float) -> bool:
        """Whether a request in [begin, end] may have been aborted by somebody else."""
        return any(_overlap(storm, begin, end) for storm in self._storms)


def _overlap(span: list[float], begin: float, end: float) -> bool:
    return span[0] <= end and span[1] >= begin
