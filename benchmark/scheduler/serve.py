"""Scheduling policies on a real server: who waits how long when 24 adapters share fewer places than they need.

The same server, unified memory, three times with another ``--schedule-policy``; few requests run at once, so that a
queue forms. It confirms on real ranks what the simulator ranks at full scale.

    python -m benchmark.scheduler.serve [--rounds 2] [--sessions 200] [--rate 8]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from benchmark.record import Recorder
from benchmark.serving import tiny
from benchmark.serving.fleet import Launch, check_tokens, fleet
from benchmark.serving.runner import CHECKED_TOKENS, Variant, interleave
from benchmark.serving.tiny import AdapterChoice
from benchmark.serving.workload import Workload

TP = 2
POLICIES = ("fcfs", "lpm", "adapter-affinity")
ADAPTERS, RANK = 24, 8
POOL_TOKENS = 4096  # about ten adapters and the KV of some sessions
MAX_RUNNING = 8


def scenarios(options: argparse.Namespace) -> dict[str, Workload]:
    """More than the server can do, for long enough that a request left behind is seen: conversations behind a shared
    prompt, and single requests that share nothing.
    """
    turns = Workload(
        options.sessions,
        options.rate,
        ADAPTERS,
        "zipf:1.0",
        cv=2.0,
        turns=(1, 3),
        user_tokens=(16, 65),
        new_tokens=(8, 25),
        system_tokens=64,
        think_s=0.5,
        vocab=tiny.VOCAB,
    )
    single = dataclasses.replace(turns, rate=2 * options.rate, popularity="hot:0.5", turns=(1, 2), system_tokens=0)
    return {
        "Zipf 1.0, 1 to 2 turns behind a shared prompt": turns,
        "One hot (half) + 23 cold, nothing shared": single,
    }


def measure(options: argparse.Namespace, folder: Path) -> None:
    """The whole benchmark, in an empty folder."""
    model, adapters = tiny.build(folder, {f"a{i}": AdapterChoice(rank=RANK) for i in range(ADAPTERS)})
    checked = {name: adapters[name] for name in list(adapters)[:2]}
    prompts, expected = tiny.prompts_and_answers(model, checked, (40,), CHECKED_TOKENS)
    common = ("--tp", str(TP), "--adapter-memory", "unified", "--max-total-tokens", str(POOL_TOKENS))
    common += ("--max-running-requests", str(MAX_RUNNING), *tiny.lora_paths(adapters))
    servers = {policy: Launch(False, (*common, "--schedule-policy", policy)) for policy in options.policies}
    settings = {
        "model": tiny.DESCRIPTION,
        "TP size": TP,
        "adapters": f"{ADAPTERS} plain, rank {RANK}",
        "server": f"unified memory of {POOL_TOKENS} slots, {MAX_RUNNING} requests at once",
        "workload": f"{options.sessions} sessions, gamma arrivals of cv 2, turns of 16 to 64 random tokens, answers of "
        f"8 to 24. With a shared prompt of 64 tokens: {options.rate:g} sessions/s, 0.5 s mean think time; without: "
        f"{2 * options.rate:g}/s",
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
            scenarios(options),
            rounds=options.rounds,
            slo_ttft_s=options.slo_ttft_s,
            adapter_bytes=lambda _: RANK * tiny.plain_bytes(TP),
            warm_up=False,  # the token check was one
        )
        recorder.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--rate", type=float, default=8.0, help="sessions per second")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--slo-ttft-s", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    main()
