"""Two nodes, each with its own launcher, serve one model: here both on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from blocklora_testing.case import NEW_TOKENS
from blocklora_testing.server import free_port, running, stop


@pytest.mark.matrix
def test_a_rank_on_each_of_two_nodes_answers_as_peft(case, tmp_path: Path) -> None:
    chosen = case("llama", 2)
    nodes = ["--tp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}", *chosen.lora_paths]
    command = [sys.executable, "-m", "sglang_blocklora.launch_server", "--model-path", str(chosen.model)]
    command += ["--dtype", "float32", "--max-total-tokens", "16384", "--random-seed", "0", "--port", str(free_port())]
    with (tmp_path / "node1").open("wb") as log:
        other = subprocess.Popen([*command, *nodes, "--node-rank", "1"], stdout=log, stderr=log, start_new_session=True)
    try:
        with running(chosen.model, *nodes, "--node-rank", "0", log=tmp_path / "node0") as server:
            assert server.many(chosen.requests(), NEW_TOKENS) == chosen.answers()
            folder = str(chosen.adapters["n4"])
            status, answer = server.call("/load_lora_adapter", {"lora_name": "later", "lora_path": folder})
            assert status == 200, answer
            assert server.tokens(chosen.prompts[0], "later", NEW_TOKENS) == chosen.expected["n4"][0]
            status, answer = server.call("/v1/completions", {"model": "nobody", "prompt": "a"})
            assert status == 404, answer
    finally:
        stop(other)
