"""A front before two real servers, one of which is killed under load and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.server import Server, free_port, running, stop, stopped_at_the_end
from sglang_blocklora.scheduling.replicas import ALWAYS_ROOM, preference

# Its launcher imports SGLang where there is one, for a mode that is not asked for here.
ROUTER = "import sys; sys.modules['sglang'] = None; from sglang_router.launch_router import main; main()"
GREEDY = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
LATE = "late"  # is loaded through the front; the others are in --adapter-dir


class Fleet:
    """Two servers of ``case``'s model, and a front before them, which is called as if it were a server."""

    def __init__(self, case: Case, folder: Path, stack: ExitStack) -> None:
        self._case, self._folder, self._stack = case, folder, stack
        self._flags = ["--adapter-dir", str(case.adapters["n8"].parent)]
        self._flags += ["--served-model-name", "llama", "--max-running-requests", "8"]
        with ThreadPoolExecutor(2) as pool:
            self.servers = list(pool.map(self.start, two_ports(case)))
        command = [sys.executable, "-m", "sglang_blocklora.route", "--port", str(free_port()), "--check-seconds", "0.5"]
        command += [text for server in self.servers for text in ("--replica", server.url)]
        log = folder / "front.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        stack.callback(stop, process)
        self.front = Server(int(command[4]), log, process)
        self.wait_for(2)
        load = {"lora_name": LATE, "lora_path": str(case.adapters["n8"])}
        status, answer = self.front.call("/v1/load_lora_adapter", load)
        assert status == 200, answer

    def start(self, port: int) -> Server:
        log = self._folder / f"log-{port}-{time.monotonic_ns()}"
        return self._stack.enter_context(running(self._case.model, *self._flags, log=log, port=port, warm=True))

    def wait_for(self, up: int) -> None:
        """Until so many replicas are up for the front, and none owes anything."""
        for _ in range(600):
            try:
                page = urllib.request.urlopen(self.front.url + "/metrics").read().decode()
            except OSError:
                page = ""
            values = {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in page.splitlines()}
            states = [
                (float(values[f'sglang_blocklora:route_up{{replica="{one.url}"}}']), values[_owed(one)])
                for one in self.servers
                if page
            ]
            if sum(state[0] for state in states) == up and all(owed == "0.0" for is_up, owed in states if is_up):
                return
            time.sleep(0.1)
        pytest.fail(f"{up} replicas should be up\n{self.front.tail()}")

    def preferred(self, adapter: str) -> int:
        urls = tuple(server.url for server in self.servers)
        return urls.index(preference(adapter, urls)[0])

    def asked(self, server: Server) -> dict[str, int]:
        """Requests that ``server`` had for each adapter."""
        listed = server.call("/adapters")[1]["data"]
        return {one["name"]: one["hits"] + one["misses"] for one in listed if one["hits"] + one["misses"]}


def two_ports(case: Case) -> tuple[int, int]:
    """Ports whose servers are both preferred by some adapters, so that there is something to see on each."""
    while True:
        ports = free_port(), free_port()
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        first = [preference(name, urls)[0] for name in case.expected if name]
        if min(first.count(url) for url in urls) >= 3:
            return ports


def _owed(server: Server) -> str:
    return f'sglang_blocklora:route_owed_adapters{{replica="{server.url}"}}'


@pytest.fixture(scope="module")
def llama(case) -> Case:
    made = case("llama", 2)
    return replace(made, expected=made.expected | {LATE: made.expected["n8"]})


@pytest.fixture(scope="module")
def fleet(llama: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(llama, tmp_path_factory.mktemp("fleet"), stack)


def test_each_adapter_is_answered_by_one_replica_as_peft(fleet: Fleet, llama: Case) -> None:
    found = []
    for start in range(0, len(llama.requests()), ALWAYS_ROOM):  # of so many at once none is sent elsewhere
        found += fleet.front.many(llama.requests()[start : start + ALWAYS_ROOM], NEW_TOKENS)
    assert found == llama.answers()
    status, models = fleet.front.call("/v1/models")
    assert {card["id"] for card in models["data"]} == {"llama", *llama.expected} - {None}
    for number, server in enumerate(fleet.servers):
        expected = {name: len(llama.prompts) for name in llama.expected if name and fleet.preferred(name) == number}
        assert fleet.asked(server) == expected
    status, answer = fleet.front.call("/v1/completions", {"model": "nobody", "prompt": "a"})
    assert status == 404, answer


def test_sglangs_own_router_keeps_an_adapter_on_one_replica_for_clients_that_send_its_header(
    fleet: Fleet, llama: Case, tmp_path: Path
) -> None:
    """It knows no adapters: without the header a request goes anywhere, and loads are not its business."""
    port, log = free_port(), tmp_path / "router.log"
    command = [sys.executable, "-c", ROUTER, "--host", "127.0.0.1", "--port", str(port), "--policy", "manual"]
    command += ["--prometheus-port", str(free_port()), "--worker-urls", *(server.url for server in fleet.servers)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    with stopped_at_the_end(Server(port, log, process), "/readiness") as router:
        for name in (name for name in llama.expected if name):
            before = [fleet.asked(server).get(name, 0) for server in fleet.servers]
            for prompt, tokens in zip(llama.prompts * 2, llama.expected[name] * 2, strict=True):
                body = {"input_ids": prompt, "lora_path": name, "sampling_params": GREEDY}
                request = urllib.request.Request(f"{router.url}/generate", json.dumps(body).encode())
                request.add_header("Content-Type", "application/json")
                request.add_header("X-SMG-Routing-Key", name)
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert json.loads(answer.read())["output_ids"] == tokens, name
            after = [fleet.asked(server).get(name, 0) for server in fleet.servers]
            assert sorted(now - was for now, was in zip(after, before, strict=True)) == [0, 2 * len(llama.prompts)]
        load = {"lora_name": "new", "lora_path": str(llama.adapters["n8"])}
        assert router.call("/v1/load_lora_adapter", load)[0] == 404
        assert router.call("/adapters")[0] == 404


def test_a_replica_is_killed_under_load_and_comes_back(fleet: Fleet, llama: Case) -> None:
    """Nobody notices but a stream that had begun there, which ends in an error; its adapters are answered by the other
    replica, and by itself once it is there again."""
    end = end_under_load(fleet, llama, 0, kill)
    assert json.loads(end)["error"]["code"] == 502


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(8))
def test_replicas_are_killed_and_drained_in_turn(fleet: Fleet, llama: Case, number: int) -> None:
    """One that is drained ends by itself, and its stream comes to its end."""
    killed = number % 4 < 2
    end = end_under_load(fleet, llama, number % 2, kill if killed else drain)
    assert (json.loads(end)["error"]["code"] == 502) if killed else (end.strip() == "[DONE]")


def end_under_load(fleet: Fleet, llama: Case, victim: int, how: Callable[[Server], None]) -> str:
    """End a replica while adapters of both are asked for, and start it again; how a stream from it ended."""
    ended, there = fleet.servers[victim], fleet.servers[1 - victim]
    its_own = [name for name in llama.expected if name and fleet.preferred(name) == victim]
    assert its_own, "these ports give it nothing"
    wrong: list[str] = []
    done = threading.Event()

    def keep_asking(number: int) -> int:
        """One request after the other; how many were answered."""
        asked = 0
        while not done.is_set():
            prompt, name = llama.requests()[(asked * 5 + number) % len(llama.requests())]
            found = fleet.front.tokens(prompt, name, NEW_TOKENS)
            if found != llama.expected[name][llama.prompts.index(prompt)]:
                wrong.append(f"{name}: {found}")
            asked += 1
        return asked

    with ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            parts = pool.submit(read_stream, fleet.front, its_own[0], lambda: how(ended)).result(timeout=120)
            fleet.wait_for(1)
            answers = fleet.front.many([(llama.prompts[0], name) for name in its_own], NEW_TOKENS)
        finally:
            done.set()
        asked = [client.result(timeout=60) for client in clients]
    assert wrong == []
    assert min(asked) > 0
    assert answers == [llama.expected[name][0] for name in its_own]
    assert fleet.asked(there).keys() >= set(its_own)
    ended.process.wait(60)
    stop(ended.process)
    fleet.servers[victim] = fleet.start(ended.port)
    fleet.wait_for(2)
    answers = fleet.front.many([(llama.prompts[1], name) for name in its_own], NEW_TOKENS)
    assert answers == [llama.expected[name][1] for name in its_own]
    assert fleet.asked(fleet.servers[victim]) == dict.fromkeys(its_own, 1)
    return parts[-1]


def kill(server: Server) -> None:
    """End it at once, all of its processes, as a machine does that is gone."""
    os.killpg(server.process.pid, signal.SIGKILL)


def drain(server: Server) -> None:
    """Ask it to end once all it has is answered."""
    os.kill(server.process.pid, signal.SIGTERM)


def read_stream(front: Server, adapter: str, after_some: Callable[[], None]) -> list[str]:
    """Data of a streamed answer that is far from its end when ``after_some`` is called."""
    body = {"model": adapter, "prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{front.url}/v1/completions", json.dumps(body).encode(), headers)
    parts = []
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                parts.append(line.removeprefix(b"data: ").decode())
                if len(parts) == 3:
                    after_some()
    return parts
