"""What must hold when a run is over."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from blocklora_testing.server import Server

BEHIND_S = 10.0
KINDS_SEEN = ("load", "evict", "read", "host-evict", "failed")


@dataclass(frozen=True, kw_only=True)
class Check:
    """name, whether it held, and what was found."""

    name: str
    held: bool
    found: str


def settled(paths: list[Path]) -> list[list[str]]:
    """Lines of logs that are written alike, once all have as many: one rank may be a step behind another.

    Waits no longer than ``BEHIND_S``: then they differ.
    """
    end = time.monotonic() + BEHIND_S
    while True:
        logs = [path.read_text().splitlines() for path in paths]
        if len({len(log) for log in logs}) == 1 or time.monotonic() > end:
            return logs
        time.sleep(0.05)


def decision_logs(path: Path, ranks: int) -> list[Check]:
    """All TP ranks wrote the same decisions, and there were some of every kind that this load is made for."""
    logs = settled([Path(f"{path}.{rank}") for rank in range(ranks)])
    lines = Counter(json.loads(line)["decision"] for line in logs[0])
    differ = [i for i, together in enumerate(zip(*logs, strict=False)) if len(set(together)) > 1]
    same = len({len(log) for log in logs}) == 1 and not differ
    where = f"first other at line {differ[0] + 1}: {[log[differ[0]] for log in logs]}" if differ else ""
    if not same and not differ:
        where = f"{[len(log) for log in logs]} decisions"
    text = ", ".join(f"{count} {kind}" for kind, count in sorted(lines.items()))
    missing = [kind for kind in KINDS_SEEN if not lines[kind]]
    return [
        Check(name="TP ranks decided alike", held=same, found=where or text),
        Check(name="memory was tight in every tier", held=not missing, found=f"never: {missing}" if missing else "yes"),
    ]


# What a process writes when it failed. A refused request may write a traceback too, as SGLang's routes do for some.
FAILURES = ("Scheduler hit an exception", "loading failed on TP rank", "Exception in ASGI application")


def log_is_clean(server: Server, words: tuple[str, ...] = ("Traceback",)) -> Check:
    """No process wrote one of ``words``, or reported a leak."""
    text = server.log_text()
    found = [word for word in (*words, "memory leak", "Segmentation fault") if word.lower() in text.lower()]
    at = text.lower().find(found[0].lower()) if found else 0
    return Check(name="no failure in the log", held=not found, found=text[at : at + 4000] if found else "none")


def alive(server: Server) -> Check:
    ended = server.process.poll()
    if ended is not None:
        return Check(name="the server lives", held=False, found=f"ended with {ended}\n{server.tail()}")
    return Check(name="the server lives", held=server.call("/health", timeout=60)[0] == 200, found="yes")
