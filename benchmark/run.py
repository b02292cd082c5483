"""``make bench``: every part of the CPU benchmarks in a process of its own, then the report.

    python -m benchmark.run [PART ...]

A part that fails or takes too long is stopped, its servers with it, and costs the others nothing: what it had measured
stays in benchmark/results/, and ``make bench PARTS=NAME`` runs it again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmark.record import REPOSITORY

STOP_S = 60  # a part that was told to stop ends its servers within this


@dataclass(frozen=True)
class Part:
    """A module to run with its arguments, and the seconds after which it is stopped."""

    module: str
    limit_s: int
    arguments: tuple[str, ...] = ()


PARTS = {
    "decode": Part("benchmark.serving.runner", 300),
    "quality": Part("benchmark.quality.train", 420),
    "counts": Part("benchmark.paper.counts", 240),
    "cost_model": Part("benchmark.paper.cost_model", 60),
    "end_to_end_tp2": Part("benchmark.paper.end_to_end", 300, ("--tp", "2")),
    "end_to_end_tp4": Part("benchmark.paper.end_to_end", 540, ("--tp", "4", "--rounds", "2")),
    "memory_simulated": Part("benchmark.memory.simulate", 300),
}


def run(name: str, part: Part) -> str | None:
    """Run one part; what went wrong, or None."""
    print(f"\n== {name} (at most {part.limit_s // 60} minutes)", flush=True)
    process = subprocess.Popen([sys.executable, "-m", part.module, *part.arguments], cwd=REPOSITORY)
    try:
        status = process.wait(part.limit_s)
        return f"ended with status {status}" if status else None
    except subprocess.TimeoutExpired:
        return f"took longer than {part.limit_s} s"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM first, so that a part ends its servers."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    names = parser.parse_args().parts or list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
    started, failures = time.monotonic(), {}
    for name in names:
        if problem := run(name, PARTS[name]):
            failures[name] = problem
            print(f"{name}: {problem}", flush=True)
    if problem := run("report", Part("benchmark.report", 120)):
        failures["report"] = problem
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if failures:
        retry = " ".join(failures)
        raise SystemExit(f"failed: {failures}; the others are done. Again: make bench PARTS='{retry}'")


if __name__ == "__main__":
    main()
