"""Where a decode step's time goes on a CPU: stacks of TP rank 0, sampled while the base model answers, by what they do.

Stock SGLang and ours, without adapters in the batch. py-spy samples the running process from outside; a stack belongs
to the first group that its innermost frames name. A step's time is measured before, without it, as in
``benchmark.peers.decode``.

    python -m benchmark.decode.step_profile [--tp 2] [--batch 1 8 32] [--rounds 3]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import psutil
import torch

from benchmark.decode import step
from benchmark.record import Recorder
from benchmark.serving import client, tiny
from benchmark.serving.fleet import Launch, Member, fleet
from benchmark.serving.tiny import AdapterChoice

PART = "step_profile"
UNDER_PROFILE = 64  # tokens of an answer
SAMPLED_S, SAMPLES_A_S = 5, 100
LOOP = "event_loop"  # of the scheduler: what other threads do is left out
GROUPS = {
    "collectives": ("torch/distributed/", "cpu_sum.py"),
    "linears": ("quantization/unquant.py",),
    "attention": ("torch_native_backend.py", "memory_pool.py"),
    "rest_of_forward": ("model_runner.py", "model_executor/"),
}
REST = "scheduler"


def group_of(frames: list[str]) -> str:
    """The group of a stack, whose innermost frame is the last."""
    for frame in reversed(frames):
        for group, names in GROUPS.items():
            if any(name in frame for name in names):
                return group
    return REST


def shares(raw: str) -> dict[str, float]:
    """Group -> share of the samples of the scheduler's loop; ``raw``: a line "frame;frame count" for each stack."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if LOOP in stack:
            counts[group_of(stack.split(";"))] += int(count)
    return {group: counts[group] / counts.total() for group in (*GROUPS, REST)}


def profile(member: Member, batch: int, number: int, stacks: Path) -> dict[str, float]:
    """Milliseconds of a step, whole and by group; ``stacks`` is the file that py-spy writes."""
    requests = step.make_requests(batch, [None], torch.Generator().manual_seed(max(number, 0)))
    with member.awake() as server:
        step_ms = step.time_step(server.url, requests, member.launch.dialect)["step_ms"]
        processes = psutil.Process(server.process.pid).children(recursive=True)
        (rank,) = (p.pid for p in processes if p.cmdline()[:1] in (["sglang::scheduler_TP0"], ["sglang::scheduler"]))
        ended = threading.Event()

        def load() -> None:
            while not ended.is_set():
                client.whole(server.url, requests, UNDER_PROFILE, member.launch.dialect)

        loading = threading.Thread(target=load)
        loading.start()
        try:
            sample(rank, stacks)
        finally:
            ended.set()
            loading.join()
    return {"step_ms": step_ms} | {f"{group}_ms": part * step_ms for group, part in shares(stacks.read_text()).items()}


def sample(process: int, stacks: Path) -> None:
    """Write the stacks of all threads of ``process`` for some seconds, those that wait too."""
    command = [Path(sys.executable).with_name("py-spy"), "record", "--pid", process, "--idle", "--threads"]
    command += ["--duration", SAMPLED_S, "--rate", SAMPLES_A_S, "--format", "raw", "--output", stacks]
    subprocess.run([*map(str, command)], check=True, capture_output=True)


def main() -> None:
    options = step.parser(__doc__, rounds=3).parse_args()
    settings = {
        "model": step.MODEL,
        "TP size": options.tp,
        "workload": step.WORKLOAD,
        "stacks": f"of TP rank 0, {SAMPLES_A_S} a second for {SAMPLED_S} s",
        "rounds": options.rounds,
    }
    flags = ("--tp", str(options.tp), "--disable-radix-cache", "--dtype", "bfloat16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapters = tiny.build(folder, {"plain-0": AdapterChoice(rank=16)}, step.SIZES)
        launches = {
            "stock SGLang": Launch(True, flags),
            "ours, base model": Launch(False, (*flags, "--adapter-memory", "static", *tiny.lora_paths(adapters))),
        }
        recorder = Recorder(PART, 0, settings)
        with fleet(model, launches, folder) as members:
            for number, variant in step.in_turn([*launches], options.rounds):
                for batch in options.batch:
                    figures = profile(members[variant], batch, number, folder / "stacks")
                    print(
                        f"round {number + 1}, batch {batch}, {variant}: {figures['step_ms']:.1f} ms a step", flush=True
                    )
                    if number >= 0:
                        recorder.add(f"Batch {batch}", variant, number, figures)
        recorder.finish()


if __name__ == "__main__":
    main()
