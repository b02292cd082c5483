"""Scheduling policies on a real server: who waits how long when 24 adapters share fewer places than they need.

The same server, unified memory, each time with another ``--schedule-policy``; few requests run at once, so that a
queue forms. It confirms on real ranks what the simulator ranks at full scale.

    python -m benchmark.scheduler.serve [--rounds 2] [--sessions 40] [--policies fcfs lpm adapter-affinity:16:16 ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmark.record import Recorder
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import CHECKED_TOKENS, Variant, interleave
from benchmark.serving.tiny import AdapterChoice
from benchmark.serving.workload import Workload

TP = 2
POLICIES = ("fcfs", "lpm", "adapter-affinity", "adapter-affinity:16:16")
BOUNDS = {"max_wait_steps": "--adapter-max-wait-steps", "round_chunks": "--adapter-round-chunks"}
ADAPTERS, RANK = 24, 8
POOL_TOKENS = 4096  # about ten adapters and the KV of some sessions
MAX_RUNNING = 8
SESSIONS = 40


def scenarios(sessions: int) -> dict[str, Workload]:
    """Conversations that all begin within seconds and ask again soon, so that about as many requests wait all the time,
    however fast the machine is. They are behind a shared prompt, and more than memory holds.
    """
    turns = Workload(
        sessions,
        rate=sessions / 2,
        adapters=ADAPTERS,
        popularity="zipf:1.0",
        turns=(3, 7),
        user_tokens=(16, 65),
        new_tokens=(8, 25),
        system_tokens=64,
        think_s=0.5,
        vocab=tiny.VOCAB,
    )
    return {"Zipf 1.0": turns, "One hot (half) + 23 cold": dataclasses.replace(turns, popularity="hot:0.5")}


def build(folder: Path) -> tuple[Path, dict[str, Path]]:
    """The model's folder, and name -> folder of the adapters."""
    return tiny.build(folder, {f"a{i}": AdapterChoice(rank=RANK) for i in range(ADAPTERS)})


def read(policy: str) -> tuple[str, dict[str, int]]:
    """``adapter-affinity:64:4`` -> its name, and the age bound (steps) and the round (prefill chunks), where given."""
    name, *numbers = policy.split(":")
    return name, dict(zip(BOUNDS, map(int, numbers), strict=False))


def launch(adapters: Mapping[str, Path], policy: str) -> Launch:
    """A server under that policy."""
    name, bounds = read(policy)
    memory = ("--adapter-memory", "unified", "--max-total-tokens", str(POOL_TOKENS))
    limits = ("--max-running-requests", str(MAX_RUNNING), "--schedule-policy", name)
    for bound, number in bounds.items():
        limits += (BOUNDS[bound], str(number))
    return Launch(False, ("--tp", str(TP), *memory, *limits, *tiny.lora_paths(adapters)))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """The whole benchmark, in an empty folder."""
    model, adapters = build(folder)
    checked = {name: adapters[name] for name in list(adapters)[:2]}
    prompts, expected = tiny.prompts_and_answers(model, checked, (40,), CHECKED_TOKENS)
    servers = {policy: launch(adapters, policy) for policy in options.policies}
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": TP,
        "adapters": f"{ADAPTERS} plain, rank {RANK}",
        "server": f"unified memory of {POOL_TOKENS} slots, {MAX_RUNNING} requests at once",
        "workload": f"{options.sessions} conversations that begin within two seconds; 3 to 6 turns of 16 to 64 random "
        "tokens, answers of 8 to 24, system prompt of 64, 0.5 s mean think time",
        "slo": f"TTFT within {options.slo_ttft_s:g} s",
        "rounds": options.rounds,
    }
    with fleet(model, servers, folder) as members:
        check_tokens(members, {name: list(checked) for name in members}, prompts, expected)
        recorder = Recorder("scheduler", 0, settings)
        interleave(
            recorder,
            members,
            {policy: Variant(policy, list(adapters)) for policy in members},
            scenarios(options.sessions),
            rounds=options.rounds,
            slo_ttft_s=options.slo_ttft_s,
            adapter_bytes=lambda _: RANK * tiny.plain_bytes(TP),
            warm_up=False,  # the token check was one
        )
        recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=list(POLICIES),
        help="adapter-affinity:64:4 is the default with another age bound and shorter rounds of fairness",
    )
    parser.add_argument("--sessions", type=int, default=SESSIONS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slo-ttft-s", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
