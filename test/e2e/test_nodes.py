"""Two nodes, each with its own launcher, serve one model: here both on this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.rollouts.trainers import as_one_file
from blocklora_testing.server import Server, free_port, running, stop

# Runs a command with mounts of its own, where something empty lies over the folder that comes first.
BEHIND_MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"']

pytestmark = pytest.mark.matrix


class Nodes:
    """The server's first node answers; ``other`` is the second, which sees nothing in ``spool`` until ``mend``."""

    def __init__(self, server: Server, other: subprocess.Popen, spool: Path, apart: bool) -> None:
        self.server, self.spool, self.apart = server, spool, apart
        self._other = other

    def mend(self) -> None:
        """From now on both nodes see the same in ``spool``."""
        into = ["nsenter", "--target", str(self._other.pid), "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*into, "umount", self.spool], check=True)


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module")
def nodes(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    spool = folder / "spool"
    spool.mkdir()
    shared = ["--tp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_port()}", *llama.lora_paths]
    shared += ["--adapter-spool-dir", str(spool)]
    command = [sys.executable, "-m", "sglang_blocklora.launch_server", "--model-path", str(llama.model)]
    command += ["--dtype", "float32", "--max-total-tokens", "16384", "--random-seed", "0", "--port", str(free_port())]
    apart = subprocess.run([*BEHIND_MOUNT, spool, "true"], check=False, capture_output=True).returncode == 0
    command = [*BEHIND_MOUNT, str(spool), *command] if apart else command
    with (folder / "node1").open("wb") as log:
        other = subprocess.Popen(
            [*command, *shared, "--node-rank", "1"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        with running(llama.model, *shared, "--node-rank", "0", log=folder / "node0") as server:
            yield Nodes(server, other, spool, apart)
    finally:
        stop(other)


def test_a_rank_on_each_of_two_nodes_answers_as_peft(nodes: Nodes, llama: Case) -> None:
    server = nodes.server
    assert server.many(llama.requests(), NEW_TOKENS) == llama.answers()
    folder = str(llama.adapters["n4"])
    status, answer = server.call("/load_lora_adapter", {"lora_name": "later", "lora_path": folder})
    assert status == 200, answer
    assert server.tokens(llama.prompts[0], "later", NEW_TOKENS) == llama.expected["n4"][0]
    status, answer = server.call("/v1/completions", {"model": "nobody", "prompt": "a"})
    assert status == 404, answer


def test_tensors_reach_both_nodes_or_none(nodes: Nodes, llama: Case) -> None:
    """All ranks refuse what one node cannot read, a first version and an update; then both read it."""
    if not nodes.apart:
        pytest.skip("this user may not mount anything, so both nodes see the same folders")
    status, answer = nodes.server.put("policy", as_one_file(llama.adapters["n3"]))
    assert (status, "--adapter-spool-dir" in answer["error"]["message"]) == (400, True), answer
    status, answer = nodes.server.put("n4", as_one_file(llama.adapters["n3"]))
    assert (status, "--adapter-spool-dir" in answer["error"]["message"]) == (400, True), answer
    names = {one["name"] for one in nodes.server.call("/adapters")[1]["data"]}
    assert "policy" not in names
    assert nodes.server.tokens(llama.prompts[0], "n4", NEW_TOKENS) == llama.expected["n4"][0]
    (spool,) = nodes.spool.iterdir()
    assert list(spool.iterdir()) == []
    nodes.mend()
    for contents in ("n3", "n2"):
        status, answer = nodes.server.put("policy", as_one_file(llama.adapters[contents]))
        assert status == 200, answer
        assert nodes.server.tokens(llama.prompts[0], "policy", NEW_TOKENS) == llama.expected[contents][0]
