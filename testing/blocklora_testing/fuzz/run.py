"""Many cases of every property, on all cores; the same cases for the same seed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from blocklora_testing.fuzz.validators import Validators

CHUNK = 2000
FAILURES_KEPT = 3  # of a chunk


@dataclass
class Row:
    """Cases of one property, how many failed, the first of these, and the seconds they took."""

    cases: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Row) -> None:
        self.cases += other.cases
        self.failed += other.failed
        self.seconds += other.seconds
        self.failures = [*self.failures, *other.failures][:FAILURES_KEPT]


def fuzz_validators(cases: int, seed: int) -> dict[str, Row]:
    """``cases`` cases shared among the properties; rows by property."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        shares = {name: share for name, (share, _) in Validators(Path(folder)).properties.items()}
    chunks = list(_chunks(shares, cases, seed))
    rows = {name: Row() for name in shares}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, row in pool.imap_unordered(_run_chunk, chunks):
            rows[name].add(row)
    return rows


def _chunks(shares: dict[str, int], cases: int, seed: int) -> Iterator[tuple[str, int, str]]:
    for name, share in shares.items():
        left, number = cases * share // sum(shares.values()), 0
        while left > 0:
            yield name, min(left, CHUNK), f"{seed}/{name}/{number}"
            left, number = left - CHUNK, number + 1


def _run_chunk(chunk: tuple[str, int, str]) -> tuple[str, Row]:
    name, count, seed = chunk
    logging.disable(logging.CRITICAL)  # refusals that no check foresaw are logged, and found here
    rng, row, begin = Random(seed), Row(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        _, check = Validators(Path(folder)).properties[name]
        for number in range(count):
            row.cases += 1
            try:
                check(rng)
            except Exception:
                row.failed += 1
                if len(row.failures) < FAILURES_KEPT:
                    row.failures.append(f"{name}, case {number} of {seed!r}:\n{traceback.format_exc()[-1500:]}")
    row.seconds = time.monotonic() - begin
    return name, row
