"""Two nodes, each with its own launcher, serve one model: here both on this machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.rollouts.trainers import as_one_file
from blocklora_testing.server import Server, free_port, running, stop

# Runs a command with mounts of its own, where nothing but an empty spool/ lies in the folder that comes first.
MOUNT = 'mount -t tmpfs none "$0" && mkdir "$0/spool" && exec "$@"'
BEHIND_MOUNT = ["unshare", "--map-root-user", "--mount", "sh", "-c", MOUNT]

pytestmark = pytest.mark.matrix


class Nodes:
    """The server's first node answers; ``other`` is the second, which sees nothing in ``hidden`` until ``mend``."""

    def __init__(self, server: Server, other: subprocess.Popen, hidden: Path, apart: bool) -> None:
        self.server, self.hidden, self.apart = server, hidden, apart
        self._other = other

    def mend(self) -> None:
        """From now on both nodes see the same in ``hidden``."""
        into = ["nsenter", "--target", str(self._other.pid), "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*into, "umount", self.hidden], check=True)

    def load(self, name: str, path: Path, update: bool = False) -> tuple[int, Any]:
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": update}
        return self.server.call("/v1/load_lora_adapter", body)

    def names(self) -> set[str]:
        return {one["name"] for one in self.server.call("/adapters")[1]["data"]}


@pytest.fixture(scope="module")
def llama(case) -> Case:
    return case("llama", 2)


@pytest.fixture(scope="module", params=[2, 4])
def nodes(request: pytest.FixtureRequest, llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    hidden = folder / "hidden"
    spool = hidden / "spool"
    spool.mkdir(parents=True)
    shutil.copytree(llama.adapters["n3"], hidden / "n3")
    shared = [
        "--tp",
        str(request.param),
        "--nnodes",
        "2",
        "--dist-init-addr",
        f"127.0.0.1:{free_port()}",
        *llama.lora_paths,
    ]
    shared += ["--adapter-spool-dir", str(spool)]
    command = [sys.executable, "-m", "sglang_blocklora.launch_server", "--model-path", str(llama.model)]
    command += ["--dtype", "float32", "--max-total-tokens", "16384", "--random-seed", "0", "--port", str(free_port())]
    apart = subprocess.run([*BEHIND_MOUNT, hidden, "true"], check=False, capture_output=True).returncode == 0
    command = [*BEHIND_MOUNT, str(hidden), *command] if apart else command
    with (folder / "node1").open("wb") as log:
        other = subprocess.Popen(
            [*command, *shared, "--node-rank", "1"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        with running(llama.model, *shared, "--node-rank", "0", log=folder / "node0") as server:
            yield Nodes(server, other, hidden, apart)
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


def test_an_adapter_that_is_broken_is_refused_alike(nodes: Nodes, llama: Case, tmp_path: Path) -> None:
    broken = shutil.copytree(llama.adapters["n2"], tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    for name, update in (("broken", False), ("n2", True)):
        status, answer = nodes.load(name, broken, update)
        assert status == 400, answer
    assert "broken" not in nodes.names()
    assert nodes.server.tokens(llama.prompts[1], "n2", NEW_TOKENS) == llama.expected["n2"][1]


def test_a_folder_that_one_node_does_not_see_is_refused_alike(nodes: Nodes, llama: Case) -> None:
    if not nodes.apart:
        pytest.skip("this user may not mount anything, so both nodes see the same folders")
    for name, update in (("unseen", False), ("n2", True)):
        status, answer = nodes.load(name, nodes.hidden / "n3", update)
        assert (status, "n3" in answer["error"]["message"]) == (400, True), answer
    assert "unseen" not in nodes.names()
    assert nodes.server.many(llama.requests(), NEW_TOKENS) == llama.answers()


def test_tensors_reach_both_nodes_or_none(nodes: Nodes, llama: Case) -> None:
    """All ranks refuse what one node cannot read, a first version and an update; then both read it."""
    if not nodes.apart:
        pytest.skip("this user may not mount anything, so both nodes see the same folders")
    status, answer = nodes.server.put("policy", as_one_file(llama.adapters["n3"]))
    assert (status, "--adapter-spool-dir" in answer["error"]["message"]) == (400, True), answer
    status, answer = nodes.server.put("n4", as_one_file(llama.adapters["n3"]))
    assert (status, "--adapter-spool-dir" in answer["error"]["message"]) == (400, True), answer
    assert "policy" not in nodes.names()
    assert nodes.server.tokens(llama.prompts[0], "n4", NEW_TOKENS) == llama.expected["n4"][0]
    (spool,) = (nodes.hidden / "spool").iterdir()
    assert list(spool.iterdir()) == []
    nodes.mend()
    assert nodes.load("unseen", nodes.hidden / "n3")[0] == 200
    assert nodes.server.tokens(llama.prompts[0], "unseen", NEW_TOKENS) == llama.expected["n3"][0]
    for contents in ("n3", "n2"):
        status, answer = nodes.server.put("policy", as_one_file(llama.adapters[contents]))
        assert status == 200, answer
        assert nodes.server.tokens(llama.prompts[0], "policy", NEW_TOKENS) == llama.expected[contents][0]
