"""Where a decode step's time goes on a CPU: stacks of TP rank 0, sampled while the base model answers, by what they do.

Stock SGLang and ours, without adapters in the batch. py-spy samples the running process from outside; a stack belongs
to the first group that its innermost frames name. A step's time is measured before, without it, as in
``benchmark.peers.decode``.

    python -m benchmark.decode.step_profile [--tp 2] [--batch 1 8 32] [--rounds 3]
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import psutil
import torch

from benchmark.decode.added_time import MODEL, PROMPT_TOKENS, SIZES
from benchmark.record import Recorder
from benchmark.serving import client, tiny
from benchmark.serving.fleet import Launch, Member, fleet
from benchmark.serving.tiny import AdapterChoice

PART = "step_profile"
SHORT, LONG, UNDER_PROFILE = 16, 80, 64  # tokens of an answer
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


def profile(member: Member, batch: int, number: int, folder: Path) -> dict[str, float]:
    """Milliseconds of a step, whole and by group."""
    generator = torch.Generator().manual_seed(number)
    prompts = torch.randint(0, tiny.VOCAB, (batch, PROMPT_TOKENS), generator=generator).tolist()
    requests = [(prompt, None) for prompt in prompts]
    with member.awake() as server:
        short, long = (client.whole(server.url, requests, n, member.launch.dialect) for n in (SHORT, LONG))
        processes = psutil.Process(server.process.pid).children(recursive=True)
        (rank,) = (p.pid for p in processes if p.cmdline()[:1] in (["sglang::scheduler_TP0"], ["sglang::scheduler"]))
        ended = threading.Event()

        def load() -> None:
            while not ended.is_set():
                client.whole(server.url, requests, UNDER_PROFILE, member.launch.dialect)

        loading = threading.Thread(target=load)
        loading.start()
        stacks = folder / "stacks"
        command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(rank), "--idle", "--threads"]
        command += [
            "--duration",
            str(SAMPLED_S),
            "--rate",
            str(SAMPLES_A_S),
            "--format",
            "raw",
            "--output",
            str(stacks),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True)
        finally:
            ended.set()
            loading.join()
    step = (long - short) / (LONG - SHORT) * 1000
    return {"step_ms": step} | {f"{group}_ms": share * step for group, share in shares(stacks.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    settings = {
        "model": MODEL,
        "TP size": options.tp,
        "workload": f"all requests at once, prompts of {PROMPT_TOKENS} random tokens, {SHORT} and {LONG} new tokens",
        "stacks": f"of TP rank 0, {SAMPLES_A_S} a second for {SAMPLED_S} s",
        "rounds": options.rounds,
    }
    flags = ("--tp", str(options.tp), "--disable-radix-cache", "--dtype", "bfloat16")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, adapters = tiny.build(folder, {"plain-0": AdapterChoice(rank=16)}, SIZES)
        launches = {
            "stock SGLang": Launch(True, flags),
            "ours, base model": Launch(False, (*flags, "--adapter-memory", "static", *tiny.lora_paths(adapters))),
        }
        recorder = Recorder(PART, 0, settings)
        with fleet(model, launches, folder) as members:
            for number, batch, (variant, member) in itertools.product(
                range(-1, options.rounds), options.batch, members.items()
            ):
                figures = profile(member, batch, max(number, 0), folder)
                print(f"round {number + 1}, batch {batch}, {variant}: {figures['step_ms']:.1f} ms a step", flush=True)
                if number >= 0:  # the first warms up
                    recorder.add(f"Batch {batch}", variant, number, figures)
        recorder.finish()


if __name__ == "__main__":
    main()
