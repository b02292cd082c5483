"""The demo's server as a subprocess: started, waited for with visible progress, and stopped with all its children."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil
from rich.console import Console
from rich.markup import escape

START_LIMIT_S = 600
STOP_LIMIT_S = 10
TAIL_LINES = 25
POLL_S = 0.25
# Where there is no terminal to draw a spinner on, one line this often.
PLAIN_PROGRESS_S = 10
# Lines of the log that say nothing about why a server failed: our own polling, and a binding's farewell.
NOISE = ('"GET /health', "nanobind", " - leaked ", " - ... skipped remainder", "reference counting issue")


class ServerFailed(Exception):
    """The server stopped, or did not become ready; the message holds the end of its log."""


def free_port(wanted: int = 0) -> int:
    """Return ``wanted``, or any TCP port of 127.0.0.1 where it is 0, that nothing listens on now.

    Raises ``ServerFailed`` where ``wanted`` is taken: SGLang would load its model first and then hang.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServerFailed(
                f"Port {wanted} cannot be used ({error.strerror}): choose another with --port."
            ) from error
        return int(probe.getsockname()[1])


class Server:
    """``python -m sglang_blocklora.launch_server`` with ``flags``, for the length of a ``with`` block.

    The server runs in a process group of its own, so a Ctrl-C reaches only us, and whatever way the block is left, the
    whole group is stopped. Its output goes to ``log``, which is kept where something failed and deleted otherwise.
    """

    def __init__(self, flags: Sequence[str], port: int, log: Path, console: Console) -> None:
        self.command = [sys.executable, "-m", "sglang_blocklora.launch_server", *flags]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.console = console
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            with self.log.open("wb") as output:
                self.process = subprocess.Popen(
                    self.command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
            self._wait_until_ready()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is None or not issubclass(kind, Exception):
            self.log.unlink(missing_ok=True)

    def check_running(self) -> None:
        """Raise ``ServerFailed`` where the server has ended by itself."""
        code = self.process.poll() if self.process else None
        if code is not None:
            raise ServerFailed(f"The server ended with exit code {code}.\n{self.tail()}")

    def stop(self) -> None:
        """Stop the server and every process it started; what ignores SIGTERM for 10 s is killed."""
        if self.process is None:
            return
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.console.status("stopping the server"):
                members = [process for process in psutil.process_iter() if _group_of(process) == self.process.pid]
                _signal_group(self.process.pid, signal.SIGTERM)
                psutil.wait_procs(members, timeout=STOP_LIMIT_S)
                _signal_group(self.process.pid, signal.SIGKILL)
                psutil.wait_procs(members, timeout=STOP_LIMIT_S)
                self.process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.process = None

    def _wait_until_ready(self) -> None:
        """Return once ``/health`` answers, showing seconds and the log's last line until then."""
        started = shown = time.monotonic()
        with self.console.status("starting the server") as status:
            while not self._healthy():
                self.check_running()
                now = time.monotonic()
                if now - started > START_LIMIT_S:
                    raise ServerFailed(f"The server was not ready after {START_LIMIT_S} s.\n{self.tail()}")
                lines = self._log_lines()
                last = lines[-1] if lines else ""
                text = escape(f"starting the server, {now - started:.0f} s: {last}"[: self.console.width - 4])
                status.update(text)
                if not self.console.is_terminal and now - shown > PLAIN_PROGRESS_S:
                    shown = now
                    self.console.print(text, highlight=False)
                time.sleep(POLL_S)
        self.console.print(f"server ready after {time.monotonic() - started:.0f} s", highlight=False)

    def _healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
        try:
            with opener.open(f"{self.url}/health", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:  # refused, timed out, or 503 while the model loads
            return False

    def _log_lines(self) -> list[str]:
        """Return the last lines of the log that are not empty, oldest first."""
        with self.log.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 65536))
            text = handle.read().decode(errors="replace")
        lines = [line for line in text.splitlines() if line.strip() and not any(noise in line for noise in NOISE)]
        return lines[-TAIL_LINES:]

    def tail(self) -> str:
        """Return the command and the end of the log, for a message."""
        return "\n".join([f"Command: {' '.join(self.command)}", f"End of {self.log}:", *self._log_lines()])


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # all members are gone
