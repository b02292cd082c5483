"""Starts a real server in a child process, sends it requests, and stops it with all of its children."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocklora_testing.warm import WarmProcess

START_TIMEOUT_S = 420
STOP_TIMEOUT_S = 10
POLL_S = 0.5
# Neither those that the system gives to connections (32768 on) nor those that SGLang takes by itself for its ranks
# (22000 to 29999) and runtimes (30000 on): between a look and SGLang's bind lie 20 s.
PORTS = range(10000, 22000)
TAIL_LINES = 25
# Lines of the log that say nothing about why a server failed: our own polling, and a binding's farewell.
NOISE = ('"GET /health', "nanobind", " - leaked ", " - ... skipped remainder", "reference counting issue")
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine


class ServerFailed(RuntimeError):
    """The server ended, or did not become ready; the message holds its command and the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running server: its address and its log."""

    port: int
    log: Path
    process: subprocess.Popen | WarmProcess

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 300, key: str | None = None
    ) -> tuple[int, Any]:
        """POST ``body`` as JSON (GET without one), with an API key; status and decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        return _answer(urllib.request.Request(self.url + path, data, headers), timeout)

    def put(self, name: str, data: bytes) -> tuple[int, Any]:
        """Load or update an adapter from one safetensors file's bytes; status and decoded answer."""
        return _answer(urllib.request.Request(f"{self.url}/adapters/{name}", data, method="PUT"), timeout=120)

    def tokens(self, prompt: list[int], adapter: str | None, new_tokens: int) -> list[int]:
        """Greedy tokens for ``prompt`` under ``adapter``."""
        status, answer = self.call(
            "/generate",
            {
                "input_ids": prompt,
                "lora_path": adapter,
                "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            },
        )
        assert status == 200, answer
        return answer["output_ids"]

    def many(self, requests: list[tuple[list[int], str | None]], new_tokens: int) -> list[list[int]]:
        """Tokens of all requests, sent at once so that they share batches; answers in their order."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda r: self.tokens(r[0], r[1], new_tokens), requests))

    def check_log(self) -> None:
        """``AssertionError`` where the server reported a traceback or a leak so far."""
        wrong = [line for line in self.log_text().splitlines() if "Traceback" in line or "memory leak" in line.lower()]
        assert not wrong, f"{wrong[0]}\n{self.tail()}"

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The command and the last lines of the log, for a message."""
        return "\n".join([f"Command: {' '.join(self.process.args)}", f"End of {self.log}:", *self.last_lines()])

    def last_lines(self) -> list[str]:
        """The last lines of the log that say something, oldest first."""
        lines = [line for line in self.log_text().splitlines() if line.strip()]
        return [line for line in lines if not any(noise in line for noise in NOISE)][-TAIL_LINES:]

    def check_running(self) -> None:
        """Raise ``ServerFailed`` where the server has ended by itself."""
        code = self.process.poll()
        if code is not None:
            raise ServerFailed(f"The server ended with exit code {code}.\n{self.tail()}")


def _answer(request: urllib.request.Request, timeout: float) -> tuple[int, Any]:
    try:
        with _DIRECTLY.open(request, timeout=timeout) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    return status, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()


def free_port(wanted: int = 0) -> int:
    """``wanted``, or where it is 0 a TCP port of 127.0.0.1 that nothing listens on now and that no one else was given.

    No one else: nobody in this process, nor in another of pytest's workers.
    ``ServerFailed`` where ``wanted`` is taken: SGLang would load its model first and then hang.
    """
    if not wanted:
        return next(port for port in _PORTS if _is_free(port))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise ServerFailed(f"Port {wanted} cannot be used ({error.strerror}): choose another one.") from error
    return wanted


def own_ports(worker: str) -> Iterator[int]:
    """The ports of this one of at most 16 workers of pytest (``gw0``...), from a random one on, round and round."""
    own = PORTS[int(worker.removeprefix("gw")) % 16 :: 16]
    first = random.randrange(len(own))
    return itertools.cycle((*own[first:], *own[:first]))


_PORTS = own_ports(os.environ.get("PYTEST_XDIST_WORKER", "gw0"))


def _is_free(port: int) -> bool:
    try:
        return free_port(port) == port
    except ServerFailed:
        return False


@contextlib.contextmanager
def running(
    model: Path,
    *flags: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    module: tuple[str, ...] = ("-m", "sglang_blocklora.launch_server"),
    port: int = 0,
    sound: bool = True,
    warm: bool = False,
    change: Callable[[], None] | None = None,
    waiting: Callable[[float, Server], None] = lambda seconds, server: None,
) -> Iterator[Server]:
    """A server for ``model`` that answers, for the length of the block; whatever happens, its processes end with it.

    flags    behind defaults for tiny models, which they may replace
    sound    whether its log is checked at the end of the block: no traceback and no leak, or ``AssertionError``
    port     0: any free one
    warm     fork it from a process that has imported SGLang (``warm.py``); ``module`` is not used
    change   where it is warm: a function of a module that changes something in the server before it starts
    waiting  called about twice a second with the seconds since the start, until the server answers
    It has a process group of its own, so a Ctrl-C reaches only its parent. ``ServerFailed`` where it does not answer.
    """
    port = free_port(port)
    arguments = ["--model-path", str(model), "--port", str(port), "--dtype", "float32"]
    if "--dp-size" not in flags:  # each replica needs a port of its own, and only SGLang can give it one
        arguments += ["--nccl-port", str(free_port())]  # where SGLang takes a random one, another may bind it first
    # Servers that stand idle beside a test's own would keep both cores busy with looking for requests.
    arguments += ["--max-total-tokens", "16384", "--random-seed", "0", "--sleep-on-idle", *flags]
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | dict(environment or {})
    log.parent.mkdir(parents=True, exist_ok=True)
    if warm:
        process: subprocess.Popen | WarmProcess = WarmProcess(arguments, log, variables, change)
    else:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, *module, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | variables,
            )
    with stopped_at_the_end(Server(port, log, process), waiting=waiting) as server:
        yield server
        if sound:
            server.check_log()


@contextlib.contextmanager
def stopped_at_the_end(
    server: Server,
    ready: str = "/health_generate",
    waiting: Callable[[float, Server], None] = lambda seconds, server: None,
) -> Iterator[Server]:
    """A server that is starting, once it answers at ``ready``; its processes end with the block."""
    try:
        _wait(server, ready, waiting)
        yield server
    finally:
        stop(server.process)


def same_decisions(log: Path, ranks: int = 2) -> str:
    """What every TP rank wrote to its decision log (``--adapter-decision-log``): they must have decided alike."""
    texts = {Path(f"{log}.{rank}").read_text() for rank in range(ranks)}
    assert len(texts) == 1, "the TP ranks decided differently"
    return texts.pop()


def _wait(server: Server, ready: str, waiting: Callable[[float, Server], None]) -> None:
    started = time.monotonic()
    while time.monotonic() < started + START_TIMEOUT_S:
        server.check_running()
        with contextlib.suppress(OSError):
            if server.call(ready, timeout=60)[0] == 200:
                return
        waiting(time.monotonic() - started, server)
        time.sleep(POLL_S)
    raise ServerFailed(f"The server did not answer within {START_TIMEOUT_S} s.\n{server.tail()}")


def stop(process: subprocess.Popen | WarmProcess) -> None:
    """End a server politely, then its process group not, and at once where a second Ctrl-C comes meanwhile."""
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)  # its children end with it: to SGLang each would be a crash
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
