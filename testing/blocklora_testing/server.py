"""A real server in a child process, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 420


@dataclass(frozen=True)
class Server:
    """A running server: its address and its log."""

    port: int
    log: Path
    process: subprocess.Popen

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 300, key: str | None = None
    ) -> tuple[int, Any]:
        """POST ``body`` as JSON (GET without one), with an API key; status and decoded answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith((b"{", b"[")) else text.decode()

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

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def running(
    model: Path,
    *flags: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    module: tuple[str, ...] = ("-m", "sglang_blocklora.launch_server"),
) -> Iterator[Server]:
    """Start a server for ``model``, wait until it answers, and stop all its processes at the end."""
    port = free_port()
    command = [sys.executable, *module, "--model-path", str(model), "--port", str(port), "--dtype", "float32"]
    command += ["--max-total-tokens", "16384", "--random-seed", "0", *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | dict(environment or {}),
        )
    server = Server(port, log, process)
    try:
        _wait(server)
        yield server
    finally:
        stop(process)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended while starting:\n{server.log_text()[-6000:]}")
        with contextlib.suppress(OSError):
            if server.call("/health_generate", timeout=60)[0] == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {START_TIMEOUT_S} s:\n{server.log_text()[-6000:]}")


def stop(process: subprocess.Popen) -> None:
    """End the process group of a server: politely, then not."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
