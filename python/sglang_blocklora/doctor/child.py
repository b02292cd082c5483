"""Runs a check in a process of its own: one that crashes or hangs is a line of the table, and the others still run."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict

from sglang_blocklora.doctor.finding import Asked, Finding, fault


def run(module: str, asked: Asked, limit_seconds: float) -> Iterator[Finding]:
    """What the ``check`` of a module finds, and a fault where that does not come to its end, or not in time."""
    command = [sys.executable, "-m", "sglang_blocklora.doctor.child", module, json.dumps(asdict(asked))]
    pipe = subprocess.PIPE
    # In a session of its own, so that processes that the check started end with it.
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        ended = None
        try:
            answers, told = process.communicate(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            ended = f"did not end within {limit_seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if ended is not None:
            answers, told = process.communicate()
        elif process.returncode:
            ended = _ended(process.returncode, told)
    yield from (Finding(**json.loads(line)) for line in answers.splitlines())
    if ended is not None:
        yield fault(module.rpartition(".")[2], ended, f"See all that it says: {shlex.join(command)}")


def _ended(status: int, told: str) -> str:
    how = f"ended with {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    last = told.strip().rpartition("\n")[2]
    return f"{how}: {last}" if last else how


def answer(check: Callable[[Asked], Iterable[Finding]], asked: Asked) -> None:
    """Write what ``check`` finds to standard output, each finding at once; all that others print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for finding in check(asked):
            print(json.dumps(asdict(finding)), file=answers, flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    answer(
        importlib.import_module(sys.argv[1]).check,
        Asked(**given | {"flags": tuple(given["flags"])}),
    )
