"""``make bench``: parts of the CPU benchmarks, each in a process of its own, then the report.

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
    """A module to run with its options, and the seconds after which it is stopped.

    ``quick``: part of the default set, which together takes less than 20 minutes on 2 cores
    """

    command: str
    limit_s: int
    quick: bool = True


PARTS = {
    "end_to_end_tp2": Part("benchmark.paper.end_to_end --tp 2", 420),
    "memory": Part("benchmark.memory.serve", 480),
    "scheduler": Part("benchmark.scheduler.serve", 720),
    "quality": Part("benchmark.quality.train", 2400, quick=False),
    "activated": Part("benchmark.activated.serve", 900, quick=False),
    "activated_base_cost": Part("benchmark.activated.base_cost", 420, quick=False),
    "added_time": Part("benchmark.decode.added_time", 600, quick=False),
    "step_profile": Part("benchmark.decode.step_profile", 900, quick=False),
    "peers_decode_tp1": Part("benchmark.peers.decode --tp 1", 3600, quick=False),
    "peers_decode_tp2": Part("benchmark.peers.decode --tp 2", 3600, quick=False),
    "peers_scarce_tp1": Part("benchmark.peers.scarce --tp 1 --mib 72 --sharded-slots --rates 1 3", 3600, quick=False),
    "peers_scarce_tp2": Part("benchmark.peers.scarce --laws zipf:0.5 zipf:1.0 hot:0.5 --rates 1 3", 5400, quick=False),
    "peers_overload_tp2": Part(
        "benchmark.peers.scarce --part peers_overload_tp2 --rates 6 12 --slots 8 --sharded-slots 12", 3600, quick=False
    ),
    "peers_many_tp2": Part(
        "benchmark.peers.scarce --part peers_many_tp2 --adapters 200 --mib 96 --slots 8 16 --sharded-slots 16 24"
        " --rates 3",
        3600,
        quick=False,
    ),
    "scheduler_host_time": Part("benchmark.scheduler.host_time", 120, quick=False),
    "counts": Part("benchmark.paper.counts --tp", 60, quick=False),
    "counts_ranks": Part("benchmark.paper.ranks", 60, quick=False),
    "counts_tp2": Part("benchmark.paper.counts --tp 2", 240, quick=False),
    "counts_tp4": Part("benchmark.paper.counts --tp 4", 420, quick=False),
    "counts_tp8": Part("benchmark.paper.counts --tp 8", 900, quick=False),
    "end_to_end_tp4": Part("benchmark.paper.end_to_end --tp 4 --rounds 5", 600, quick=False),
}


def run(name: str, part: Part) -> str | None:
    """Run one part; what went wrong, or None."""
    print(f"\n== {name} (at most {part.limit_s // 60} minutes)", flush=True)
    process = subprocess.Popen([sys.executable, "-m", *part.command.split()], cwd=REPOSITORY)
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


def chosen(asked: list[str]) -> list[str]:
    """The parts to run: those named, those of a group (``peers``), ``all``, or the quick ones when none is.

    ``SystemExit`` for unknown names.
    """
    named = {part for name in asked for part in members(name)}
    return [name for name, part in PARTS.items() if name in named or (part.quick and not asked)]


def members(name: str) -> list[str]:
    """The part of that name, or the parts that begin with it."""
    found = [part for part in PARTS if name in ("all", part)]
    found = found or [part for part in PARTS if part.startswith(f"{name}_")]
    if not found:
        raise SystemExit(f"unknown part {name}; known: {', '.join(PARTS)}, all")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}, all (default: the quick ones)"
    )
    failed, began = [], time.monotonic()
    for name in chosen(parser.parse_args().parts):
        started = time.monotonic()
        problem = run(name, PARTS[name])
        print(f"{name}: {problem or 'done'} after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
        failed += [name] if problem else []
    if problem := run("report", Part("benchmark.report", 120)):
        raise SystemExit(f"report: {problem}. Again: make bench-report")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    if failed:
        raise SystemExit(f"failed, the others are done. Again: make bench PARTS='{' '.join(failed)}'")


if __name__ == "__main__":
    main()
