"""Starts one server over several nodes of a Ray cluster, and ends it as a whole.

``serve.py --nodes 2 --gpus 8 -- FLAG ...`` runs on the node that is to be the first. The launcher of each node gets the
same flags and its own ``--node-rank``.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PORT = 20000
WAIT_S = 600
STOP_S = 30


@ray.remote(max_concurrency=2)
class Launcher:
    """The launcher of one node."""

    def __init__(self, flags: list[str]) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "sglang_blocklora.launch_server", *flags])

    def wait(self) -> int:
        """Its exit code, once it ends."""
        return self._process.wait()

    def stop(self) -> None:
        """End it, politely first."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()


def nodes(count: int, gpus: int) -> list[dict]:
    """``count`` nodes with so many GPUs, this one first. ``SystemExit`` where there are not so many after a while."""
    here = ray.get_runtime_context().get_node_id()
    until = time.monotonic() + WAIT_S
    while True:
        found = [one for one in ray.nodes() if one["Alive"] and one["Resources"].get("GPU", 0) >= gpus]
        found.sort(key=lambda one: (one["NodeID"] != here, one["NodeID"]))
        if len(found) >= count and found[0]["NodeID"] == here:
            return found[:count]
        if time.monotonic() > until:
            sys.exit(f"{len(found)} nodes with {gpus} GPUs after {WAIT_S} s, wanted {count}, this one among them")
        time.sleep(1)


def main() -> int:
    """Serve until a launcher ends or a signal comes; the first exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of each node")
    parser.add_argument("flags", nargs="+", metavar="-- FLAG", help="of the launcher")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init()
    chosen = nodes(asked.nodes, asked.gpus)
    shared = [*asked.flags, f"--nnodes={asked.nodes}", f"--dist-init-addr={chosen[0]['NodeManagerAddress']}:{PORT}"]
    launchers = [
        Launcher.options(
            num_gpus=asked.gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote([*shared, f"--node-rank={rank}"])
        for rank, node in enumerate(chosen)
    ]
    try:
        ended, _ = ray.wait([one.wait.remote() for one in launchers], num_returns=1)
        return int(ray.get(ended[0]))
    finally:  # without one of its nodes it is no server
        ray.wait([one.stop.remote() for one in launchers], num_returns=len(launchers), timeout=2 * STOP_S)


if __name__ == "__main__":
    sys.exit(main())
