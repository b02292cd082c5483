"""Memory, open files and threads of a server's processes over a run."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

EVERY_S = 2.0
MIB = 2**20
# Level: the median of the last quarter is not above that of the first quarter by more than this.
MOST_GROWTH = 0.05
LEAST_GROWTH_MIB = 24.0
MOST_NEW_FILES = 24  # connections of clients among them
MOST_NEW_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    seconds: float
    rss_mib: float
    files: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Of one process between the first quarter of the samples that count and the last, by medians."""

    name: str
    first: Sample
    last: Sample

    @property
    def level(self) -> bool:
        allowed = max(self.first.rss_mib * MOST_GROWTH, LEAST_GROWTH_MIB)
        return (
            self.last.rss_mib - self.first.rss_mib <= allowed
            and self.last.files - self.first.files <= MOST_NEW_FILES
            and self.last.threads - self.first.threads <= MOST_NEW_THREADS
        )

    def __str__(self) -> str:
        pairs = {
            "MiB": (round(self.first.rss_mib), round(self.last.rss_mib)),
            "files": (self.first.files, self.last.files),
            "threads": (self.first.threads, self.last.threads),
        }
        return ", ".join(f"{before} → {after} {what}" for what, (before, after) in pairs.items())


class Watch:
    """Samples a process and its children until it is cancelled."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._begin = time.monotonic()
        self._samples: dict[int, list[Sample]] = defaultdict(list)
        self._names: dict[int, str] = {}
        self.first = self.processes()

    def processes(self) -> set[int]:
        """Process ids that are there now."""
        return {process.pid for process in self._all()}

    def describe(self, pid: int) -> str:
        """What runs there, and for how long."""
        try:
            process = psutil.Process(pid)
            return (
                f"{' '.join(process.cmdline())[:200]} ({process.status()}, {time.time() - process.create_time():.0f} s)"
            )
        except psutil.NoSuchProcess:
            return f"{pid}, which has ended"

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    async def run(self) -> None:
        while True:
            for process in self._all():
                self._sample(process)
            await asyncio.sleep(EVERY_S)

    def _sample(self, process: psutil.Process) -> None:
        try:
            self._names.setdefault(process.pid, _name(process))
            sample = Sample(
                seconds=time.monotonic() - self._begin,
                rss_mib=process.memory_info().rss / MIB,
                files=process.num_fds(),
                threads=process.num_threads(),
            )
        except psutil.NoSuchProcess:
            return
        self._samples[process.pid].append(sample)

    def growth(self, after_s: float) -> list[Growth]:
        """Of every process that lives, over the samples that were taken later than ``after_s``."""
        found = []
        for pid in sorted(self.processes()):
            samples = [sample for sample in self._samples[pid] if sample.seconds >= after_s]
            quarter = max(1, len(samples) // 4)
            if samples:
                name = self._names[pid]
                found.append(Growth(name=name, first=_median(samples[:quarter]), last=_median(samples[-quarter:])))
        return found


def _median(samples: Iterable[Sample]) -> Sample:
    samples = list(samples)
    return Sample(
        seconds=statistics.median(sample.seconds for sample in samples),
        rss_mib=statistics.median(sample.rss_mib for sample in samples),
        files=int(statistics.median(sample.files for sample in samples)),
        threads=int(statistics.median(sample.threads for sample in samples)),
    )


def _name(process: psutil.Process) -> str:
    """SGLang names its processes; others by what they run."""
    line = process.cmdline()
    return line[0].rsplit("/", 1)[-1][:40] if line else process.name()
