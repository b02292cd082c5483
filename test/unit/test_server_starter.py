"""The starter of servers that tests, benchmarks and the demo share: stand-ins of a few lines for a server."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from blocklora_testing.server import PORTS, ServerFailed, free_port, own_ports, running

ENDS = ("-c", "import sys; print('GPU is on fire'); sys.exit(3)")
# Answers only its third health check, and has a child that would outlive it.
ANSWERS = (
    "-c",
    """
import http.server, subprocess, sys

model = sys.argv[sys.argv.index("--model-path") + 1]
subprocess.Popen([sys.executable, "-c", f"import time; alive = open({model + '/alive'!r}, 'w'); time.sleep(600)"])

class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0

    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.end_headers()

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
""",
)


def test_a_server_that_ends_while_starting_is_told_with_its_last_lines(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"(?s)exit code 3.*Command: .*--flag.*GPU is on fire"),
        running(tmp_path, "--flag", log=tmp_path / "log", module=ENDS),
    ):
        pytest.fail("it never answered")


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_the_block_begins_when_it_answers_and_ends_all_of_its_processes(
    tmp_path: Path, error: type[BaseException] | None
) -> None:
    os.mkfifo(tmp_path / "alive")
    told: list[float] = []
    try:
        with running(
            tmp_path, log=tmp_path / "log", module=ANSWERS, waiting=lambda seconds, server: told.append(seconds)
        ) as server:
            child = (tmp_path / "alive").open("rb")
            server.check_running()
            if error:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        assert error
    assert len(told) >= 2
    assert told == sorted(told)
    assert server.process.poll() is not None
    with child:
        assert child.read() == b"", "an end that comes when the child is gone"
    with pytest.raises(ServerFailed, match="exit code"):
        server.check_running()


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerFailed, match=f"Port {port} cannot be used"),
            running(tmp_path, log=tmp_path / "log", module=ENDS, port=port),
        ):
            pytest.fail("it started")
    assert not (tmp_path / "log").exists()
    assert free_port(port) == port


def test_ports_given_are_not_given_again_nor_to_another_worker() -> None:
    given = [free_port() for _ in range(50)]
    assert len(set(given)) == 50
    assert set(given) <= set(PORTS)
    mine, other = ({next(ports) for _ in range(700)} for ports in (own_ports("gw0"), own_ports("gw1")))
    assert len(mine) == len(other) == 700
    assert not mine & other
