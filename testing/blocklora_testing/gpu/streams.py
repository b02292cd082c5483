"""Stand-ins for ``torch.cuda``'s streams and events, which record order."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from blocklora_testing.gpu.trace import HOST, Clock, Trace, merge, where

POOL = 32  # streams that torch hands out in turn


class Streams:
    """``Stream``, ``Event``, ``stream`` and ``current_stream`` over one trace.

    lost      calls that are left out, by a part of their line of code: planted faults
    left_out  how many were
    """

    def __init__(self, trace: Trace, lost: Collection[str] = ()) -> None:
        self.trace = trace
        self.lost = lost
        self.left_out = 0
        streams, is_lost, handed_out = self, self.is_lost, iter(range(1 << 30))

        class Stream:
            def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
                self.number = next(handed_out) % POOL + 2 if number is None else number
                self.device = device

            def __eq__(self, other: object) -> bool:
                return isinstance(other, Stream) and self.number == other.number

            def __hash__(self) -> int:
                return hash(self.number)

            @property
            def clock(self) -> Clock:
                return trace.clocks[self.number]

            def wait_stream(self, other: Stream) -> None:
                if not is_lost():
                    merge(self.clock, other.clock)

            def wait_event(self, event: Event) -> None:
                if not is_lost():
                    merge(self.clock, event.clock)

        class Event:
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.clock: Clock = {}

            def record(self, stream: Stream | None = None) -> None:
                self.clock = dict((stream or streams.current).clock)
                merge(self.clock, trace.clocks[HOST])

            def wait(self, stream: Stream | None = None) -> None:
                (stream or streams.current).wait_event(self)

            def query(self) -> bool:
                """Whether it is certain to have happened: a GPU may be faster."""
                known = trace.clocks[HOST]
                return all(time <= known.get(thread, 0) for thread, time in self.clock.items())

            def synchronize(self) -> None:
                if not is_lost():
                    trace.host_knows(self.clock)

        self.Stream, self.Event = Stream, Event
        self._current = [Stream(number=1)]

    def is_lost(self) -> bool:
        """Whether the call is one of those that are left out."""
        hit = bool(self.lost) and any(text in where() for text in self.lost)
        self.left_out += hit
        return hit

    @property
    def current(self) -> Any:
        return self._current[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()
