"""A TP rank that ends while others wait for it ends the server: nobody waits for ever."""

from __future__ import annotations

import contextlib
import http.client
import threading
from pathlib import Path

import psutil
from blocklora_testing.models import build_model
from blocklora_testing.server import running

WITHIN_S = 60


def test_a_rank_that_is_killed_in_a_step_ends_the_server(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama")
    with running(model, "--tp", "2", log=tmp_path / "log", sound=False) as server:
        processes = psutil.Process(server.process.pid).children(recursive=True)
        (rank,) = (process for process in processes if process.cmdline()[:1] == ["sglang::scheduler_TP1"])

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the server ends before the answer
                server.tokens([1, 2, 3], None, 2000)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(2)
        assert asking.is_alive(), "nothing ran when the rank was killed"
        rank.kill()
        server.process.wait(WITHIN_S)
        _, alive = psutil.wait_procs(processes, WITHIN_S)
        assert alive == []
