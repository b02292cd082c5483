"""Records which stream touched which memory after what, and finds accesses that nothing orders.

Order is kept in vector clocks (Lamport; Mattern): one component for the host and one for each stream. An operation
happens before another one where the other's clock has reached its own.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

HOST = 0
OURS = tuple(str(Path(__file__).parents[3] / part) for part in ("kernels", "python", "patches"))
Clock = dict[int, int]


def merge(clock: Clock, other: Clock) -> None:
    """Let what ``other`` knows be known to ``clock``."""
    for thread, time in other.items():
        clock[thread] = max(clock.get(thread, 0), time)


@dataclass
class Buffer:
    """A piece of memory.

    place       "device", "pinned" or "pageable"
    stream      that allocated it; its memory may be used there again once it is freed
    recorded    streams for which ``record_stream`` keeps it
    row_bytes   where accesses are told apart by row, else None
    """

    number: int
    place: str
    size_bytes: int
    stream: int
    where: str
    recorded: set[int] = field(default_factory=set)
    row_bytes: int | None = None


@dataclass(frozen=True)
class Access:
    """A part of a buffer, as bytes [first, stop) or as rows, that an operation reads or writes."""

    buffer: Buffer
    writes: bool
    first: int = 0
    stop: int = 0
    rows: frozenset[int] = frozenset()

    def overlaps(self, other: Access) -> bool:
        if self.buffer.row_bytes is not None:
            return not self.rows.isdisjoint(other.rows)
        return self.first < other.stop and other.first < self.stop


@dataclass(frozen=True)
class Operation:
    """One launch, copy or access of the host. ``thread`` is its stream, or ``HOST``."""

    name: str
    thread: int
    where: str
    clock: Clock

    def before(self, clock: Clock) -> bool:
        return self.clock[self.thread] <= clock.get(self.thread, 0)

    def __str__(self) -> str:
        return f"{self.name} on {'the host' if self.thread == HOST else f'stream {self.thread}'} ({self.where})"


@dataclass(frozen=True)
class Finding:
    """What must not be: ``kind`` is "race", "wait", "freed" or "allocation"; ``line`` is the line of ours, as text."""

    kind: str
    text: str
    line: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}: {self.line}"


class Trace:
    """Operations in the order in which the host asked for them. ``findings`` grows as they come."""

    def __init__(self) -> None:
        self.findings: dict[Finding, None] = {}  # each once, in order
        self.clocks: dict[int, Clock] = defaultdict(dict)
        self.operations = 0
        self._accesses: dict[int, list[tuple[Operation, Access]]] = defaultdict(list)

    def run(self, name: str, thread: int, accesses: Iterable[Access]) -> Operation:
        """Add an operation; races with earlier ones become findings."""
        clock = self.clocks[thread]
        merge(clock, self.clocks[HOST])  # the host has asked for it after all that it knows to be done
        clock[thread] = clock.get(thread, 0) + 1
        operation = Operation(name, thread, where(), dict(clock))
        self.operations += 1
        for access in accesses:
            earlier = self._accesses[access.buffer.number]
            for other, touched in earlier:
                if (access.writes or touched.writes) and touched.overlaps(access) and not other.before(clock):
                    self.find("race", f"{access.buffer.place} memory: {other} and {operation} are in no order")
                    break
            earlier.append((operation, access))
        return operation

    def host_knows(self, clock: Clock) -> None:
        """The host has waited until then: what is done is in order with all that it asks for from now on."""
        known = self.clocks[HOST]
        merge(known, clock)
        for number, accesses in self._accesses.items():
            self._accesses[number] = [one for one in accesses if not one[0].before(known) or one[0].thread == HOST]

    def freed(self, buffer: Buffer) -> None:
        """The allocator may give the memory away again, in the order of the stream that it was allocated on."""
        clock = dict(self.clocks[buffer.stream])
        merge(clock, self.clocks[HOST])
        for operation, _ in self._accesses.pop(buffer.number, ()):
            known = operation.before(clock) or operation.thread in (buffer.stream, HOST, *buffer.recorded)
            if buffer.place == "device" and not known:
                self.find("freed", f"memory allocated at {buffer.where} while {operation} may still run")

    def find(self, kind: str, text: str) -> None:
        self.findings.setdefault(Finding(kind, text, where()))


def where() -> str:
    """The innermost line of the project's own code that is running, behind its file's name.

    In brackets where it is SGLang's code that runs, below that line.
    """
    frame, below = sys._getframe(1), False
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            text = f"{Path(file).name}: {linecache.getline(file, frame.f_lineno).strip()}"
            return f"[{text}]" if below else text
        below |= f"{os.sep}sglang{os.sep}" in file
        frame = frame.f_back
    return "not ours"
