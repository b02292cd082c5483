"""Reads adapters' files beside the scheduler's steps; TP rank 0 decides when all ranks have read.

A read takes as long as the storage does, and no step may wait for it. Every TP rank starts the same reads in the same
order, in threads of its own. Whether one is done is asked on TP rank 0 only; what it finds is a ``Decision``, which
travels to all ranks with the next requests, so all of them learn it in the same step.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from sglang_blocklora.adapters.loading import Found, LocalShard, Report, merge
from sglang_blocklora.memory.durations import Durations

# Reads at once on a TP rank: more would share the same storage.
READS_AT_ONCE = 4
POLL_SECONDS = 0.002


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of read number ``number`` on all TP ranks: the merged report."""

    number: int
    report: Report


class Board(Protocol):
    """Where TP ranks leave reports for TP rank 0. Any thread may call it; nothing waits."""

    def post(self, number: int, report: Report) -> None:
        """Leave this rank's report of a read."""

    def collect(self, number: int) -> Sequence[Report] | None:
        """On TP rank 0: all ranks' reports in rank order, once, or None while some are missing."""


class Store(Protocol):
    """As much of ``torch.distributed.Store`` as a board needs."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def delete_key(self, key: str) -> bool: ...


class LocalBoard:
    """The board of a single TP rank."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}

    def post(self, number: int, report: Report) -> None:
        self._reports[number] = report

    def collect(self, number: int) -> Sequence[Report] | None:
        report = self._reports.pop(number, None)
        return None if report is None else [report]


class StoreBoard:
    """A board in the key-value store through which the TP ranks found each other."""

    def __init__(self, store: Store, tp_rank: int, tp_size: int) -> None:
        self._store, self._rank, self._size = store, tp_rank, tp_size

    def post(self, number: int, report: Report) -> None:
        self._store.set(self._key(number, self._rank), msgspec.json.encode(report).decode())

    def collect(self, number: int) -> Sequence[Report] | None:
        keys = [self._key(number, rank) for rank in range(self._size)]
        if not self._store.check(keys):
            return None
        reports = [msgspec.json.decode(self._store.get(key), type=Report) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return reports

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"blocklora/read/{number}/{rank}"


class _Read:
    """One read on this TP rank."""

    def __init__(self, number: int, name: str, path: str, run: Callable[[], Found]) -> None:
        self.number, self.name, self.path, self.run = number, name, path, run
        self.began: float | None = None
        self.seconds = 0.0
        self.done = False
        self.decided = False
        self.local: LocalShard | None = None


class Reads:
    """The reads of one TP rank. All methods are called from the scheduler's thread, none of them waits.

    timeout_seconds  TP rank 0 gives up a read that is not done on all ranks so long after it began there
    durations        of reads on this rank that all ranks finished
    wake_fd          readable while ``decisions`` has something to give: for a scheduler that sleeps
    """

    def __init__(self, tp_rank: int, board: Board, timeout_seconds: float) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self.durations = Durations()
        self._decides = tp_rank == 0
        self._board = board
        self._timeout_seconds = timeout_seconds
        self._count = 0
        self._reads: dict[int, _Read] = {}
        self._stuck: set[str] = set()  # paths of reads that were given up and have not come back
        self._permits = threading.Semaphore(READS_AT_ONCE)
        self._lock = threading.Lock()
        self._undecided: deque[_Read] = deque()
        self._decisions: list[Decision] = []
        self._new = threading.Event()
        if self._decides:
            threading.Thread(target=self._watch, name="adapter-reads", daemon=True).start()

    def start(self, name: str, path: str, run: Callable[[], Found]) -> int:
        """Begin to read in the background; all TP ranks call it alike. The number that its decision will carry.

        run  reads this rank's part and never raises
        """
        self._count += 1
        read = self._reads[self._count] = _Read(self._count, name, path, run)
        threading.Thread(target=self._run, args=(read,), name=f"adapter-read-{read.number}", daemon=True).start()
        if self._decides:
            self._undecided.append(read)
            self._new.set()
        return read.number

    def decisions(self) -> list[Decision]:
        """On TP rank 0: what is to be told to all ranks, until ``finish`` has it. Nothing on other ranks."""
        if not self._decisions:
            return []
        with self._lock:
            return list(self._decisions)

    def finish(self, decision: Decision) -> LocalShard | None:
        """End a read that was decided: what this rank read, where all ranks did. All TP ranks call it alike."""
        read = self._reads.pop(decision.number)
        with self._lock:
            read.decided = True
            if read.began is not None and not read.done:  # its thread may never come back
                self._stuck.add(read.path)
                self._permits.release()
            if decision in self._decisions:
                self._decisions.remove(decision)
                os.eventfd_read(self.wake_fd)
        if decision.report.error is not None:
            return None
        self.durations.add(read.seconds)
        return read.local

    def _run(self, read: _Read) -> None:
        self._permits.acquire()
        with self._lock:
            if read.decided:
                self._permits.release()
                return
            stuck = read.path in self._stuck
            read.began = time.monotonic()
        found: Found = (self._refusal(read, "an earlier read has not come back"), None) if stuck else read.run()
        with self._lock:
            if read.decided:
                self._stuck.discard(read.path)
                return
            read.local, read.done = found[1], True
            read.seconds = time.monotonic() - read.began
            self._permits.release()
        self._board.post(read.number, found[0])

    def _watch(self) -> None:
        """Look for reads that all TP ranks have finished, or that take too long."""
        while True:
            self._new.wait()
            self._new.clear()
            while self._undecided:
                for _ in range(len(self._undecided)):
                    read = self._undecided.popleft()
                    report = self._report(read)
                    if report is None:
                        self._undecided.append(read)
                        continue
                    with self._lock:
                        self._decisions.append(Decision(number=read.number, report=report))
                        os.eventfd_write(self.wake_fd, 1)
                time.sleep(POLL_SECONDS)

    def _report(self, read: _Read) -> Report | None:
        reports = self._board.collect(read.number) if read.done else None
        if reports is not None:
            return merge(read.name, read.path, reports)
        if read.began is not None and time.monotonic() - read.began > self._timeout_seconds:
            return self._refusal(read, f"it could not be read within {self._timeout_seconds:g} s")
        return None

    @staticmethod
    def _refusal(read: _Read, why: str) -> Report:
        advice = "Look after the storage, or give it more time with --adapter-read-timeout."
        return Report(error=f"adapter {read.name!r}: {why} (folder {read.path}). {advice}")
