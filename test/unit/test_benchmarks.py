"""What the server benchmarks compute by themselves: equal memory, order of rounds, parts that fail."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from benchmark.decode.step_profile import shares
from benchmark.memory.serve import RANKS, STOCK_SLOTS, TP, EqualMemory
from benchmark.run import PARTS, Part, chosen, run
from benchmark.serving import client, runner, tiny
from benchmark.serving.fleet import Launch, visitors
from benchmark.serving.runner import Variant, interleave
from benchmark.serving.workload import Workload

MIB = 2**20


def test_every_server_gets_the_same_bytes(tmp_path):
    """Against the tensors that PEFT wrote, cut as SGLang cuts them: A whole and B split on column layers, and so on."""
    rank = max(RANKS)
    _, adapters = tiny.build(tmp_path, {"sql": tiny.AdapterChoice(rank=rank)})
    on_rank = 0
    with safe_open(adapters["sql"] / "adapter_model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (not a dict)
            row_parallel = "o_proj" in name or "down_proj" in name
            split = row_parallel == ("lora_A" in name)
            on_rank += math.prod(tensors.get_slice(name).get_shape()) * 4 // (TP if split else 1)
    memory = EqualMemory(kv_tokens=1000)
    token = 2 * tiny.LAYERS * (tiny.KV // TP) * 4
    assert memory.slots_bytes == STOCK_SLOTS * on_rank
    stock = STOCK_SLOTS * on_rank + 1000 * token
    assert stock - token < memory.static_tokens * token + memory.arena_mib * MIB <= stock
    assert stock - token < memory.unified_tokens * token <= stock


class Fake:
    """A member of the fleet that counts one adapter load for each pass."""

    def __init__(self, name: str) -> None:
        self.name, self.loads, self.launch = name, 0, Launch(False, ())

    @contextlib.contextmanager
    def awake(self):
        yield SimpleNamespace(url=self.name)

    def flush(self) -> None:
        pass

    def adapter_loads(self) -> Counter[str]:
        return Counter(a=self.loads)


class Starts:
    """An engine that tells when it is started and stopped."""

    def __init__(self) -> None:
        self.told: list[str] = []

    @contextlib.contextmanager
    def start(self, model: Path, log: Path, loads: Path):
        self.told.append(f"start {model} {log} {loads}")
        yield SimpleNamespace(url="here")
        self.told.append("stop")


def test_a_visitor_is_up_while_it_is_awake_and_started_anew_each_time():
    engine = Starts()
    (member,) = visitors(Path("model"), {"one": engine}, Path("folder")).values()
    assert not engine.told
    for _ in range(2):
        with member.awake() as server:
            assert server is member.server
            assert engine.told == ["start model folder/one.log folder/one.loads"]
        assert engine.told[1:] == ["stop"]
        engine.told.clear()


def test_rounds_run_forth_and_back_with_the_same_sessions_for_all(monkeypatch):
    members = {name: Fake(name) for name in ("x", "y")}
    played, recorded = [], []

    def play(url, sessions, names, label, dialect):
        members[url].loads += 1
        played.append((url, sessions[0].turns[0].tokens.tolist()))
        return [client.Answer(0, 2, ttft_s=1.0, last_s=2.0, tokens=[1, 2], itl_s=[1.0], prompt_tokens=1)], 1.0

    monkeypatch.setattr(runner.client, "play", play)
    recorder = SimpleNamespace(add=lambda *arguments: recorded.append(arguments))
    variants = {"A": Variant("x", ["a"]), "B": Variant("y", ["a"])}
    scenarios = {"one": Workload(1, math.inf, 1, "zipf:0")}
    checked: list[str] = []
    interleave(
        recorder,
        members,
        variants,
        scenarios,
        rounds=2,
        slo_ttft_s=1.0,
        adapter_bytes=lambda _: MIB,
        check=lambda member: checked.append(member.name),
    )
    assert checked == [url for url, _ in played]
    assert [url for url, _ in played] == ["y", "x", "x", "y", "y", "x"]  # the first two warm up
    assert played[2][1] == played[3][1] != played[4][1] == played[5][1]
    assert [(variant, number) for _, variant, number, _ in recorded] == [("A", 0), ("B", 0), ("B", 1), ("A", 1)]
    assert {figures["adapter_loads"] for *_, figures in recorded} == {1}
    assert {figures["copied_mib"] for *_, figures in recorded} == {1.0}


@pytest.mark.parametrize(("command", "problem"), [("this", None), ("benchmark.no_such_part", "ended with status 1")])
def test_what_went_wrong_with_a_part_is_told(command, problem, capfd):
    assert run("part", Part(command, 60)) == problem


def test_parts_are_chosen():
    assert chosen(["quality", "memory"]) == ["memory", "quality"]
    assert chosen(["activated"]) == ["activated"]
    peers = ["decode_tp1", "decode_tp2", "scarce_tp1", "scarce_tp2", "overload_tp2", "many_tp2"]
    assert chosen(["peers"]) == [f"peers_{name}" for name in peers]
    assert chosen(["all"]) == list(PARTS)
    assert set(chosen([])) < set(PARTS)
    with pytest.raises(SystemExit, match="unknown part decod"):
        chosen(["decod"])


def test_stacks_are_told_apart_by_their_innermost_frames():
    loop = "thread (7): MainThread;event_loop_overlap (scheduler.py:1)"
    forward = f"{loop};ModelRunner.forward (model_executor/model_runner.py:2)"
    raw = f"""{loop};recv_requests (io.py:3) 10
{forward};apply (quantization/unquant.py:4) 40
{forward};all_reduce (distributed/parallel_state.py:5);all_reduce (torch/distributed/distributed_c10d.py:6) 30
{forward};norm (layernorm.py:7) 20
thread (8): watchdog;wait (threading.py:8) 100"""
    assert shares(raw) == {
        "collectives": 0.3,
        "linears": 0.4,
        "attention": 0.0,
        "rest_of_forward": 0.2,
        "scheduler": 0.1,
    }
