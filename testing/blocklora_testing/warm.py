"""Forks servers from a process that has imported SGLang once, for tests that do not ask how a server starts.

A start as users make it imports everything in each of four processes, which is most of what it takes. The tests of the
HTTP API, of replicas, nodes and engines start that way.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path


class WarmProcess:
    """A forked server, with what is used of ``subprocess.Popen``; it has a process group of its own."""

    def __init__(
        self, args: Sequence[str], log: Path, environment: Mapping[str, str], change: Callable[[], None] | None = None
    ) -> None:
        """Start it with the launcher's arguments; the variables are set before it runs, and after SGLang's import.

        change  a function of a module, called then too; what it changes is changed in all processes of the server
        """
        self.args = [*args]
        self._process = _context().Process(target=_serve, args=(self.args, log, dict(environment), change))
        self._process.start()
        self.pid = int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; ``subprocess.TimeoutExpired`` where it still runs after ``timeout`` seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code


@cache
def _context() -> ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP reads it when torch is imported, in the process that forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.warm_imports"])
    return context


def _serve(argv: Sequence[str], log: Path, environment: Mapping[str, str], change: Callable[[], None] | None) -> None:
    from sglang_blocklora import launch_server

    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    os.environ |= environment
    if change is not None:
        change()
    sys.argv = ["launch_server", *argv]
    # SGLang asks for "spawn" when it starts its processes: they would import everything anew.
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None
    launch_server.main(argv)
