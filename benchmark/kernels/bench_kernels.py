"""Our kernels against SGLang's, bmm and flashinfer on the per-rank shapes of Llama-3.1-8B and 70B. Needs a GPU.

    python benchmark/kernels/bench_kernels.py [--models 8B] [--tp 8] [--out results.jsonl] ...

Runs test/kernels/test_gpu.py first and measures nothing if it fails. Each line of the output file is one method on one
problem; a Markdown table of medians follows on stdout. Methods run in A B B A order on weights that are not in L2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapes
import torch
from methods import METHODS, Run
from problem import Problem, build
from timing import capture, copy_bandwidth_bytes_per_s, replay_times_us

ROOT = Path(__file__).parents[2]
# Tokens, adapters and tokens per request of the batches.
DECODE = [(1, 1), (16, 1), (16, 16), (64, 16), (64, 64), (256, 1), (256, 64)]
PREFILL = [(2048, 1), (2048, 8)]


def refuse_unless_right() -> None:
    """Exit unless the GPU tests ran and passed."""
    command = [sys.executable, "-m", "pytest", "-q", "test/kernels/test_gpu.py"]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(tests.stdout[-2000:])
    if tests.returncode or " passed" not in tests.stdout or "skipped" in tests.stdout:
        raise SystemExit("The GPU tests did not all pass: no figures.")


def conditions() -> dict[str, Any]:
    """Machine, versions and commit of every figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "kernels"], cwd=ROOT, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_bytes_per_s": copy_bandwidth_bytes_per_s(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "sglang": importlib.metadata.version("sglang"),
        "commit": commit.stdout.strip() + ("-dirty" if dirty.stdout else ""),
        "seed": 0,
    }


def problems(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Problem]]:
    """Every selected problem with the words that name it; a problem is freed before the next is built."""
    for model_name in arguments.models:
        model = shapes.MODELS[model_name]
        for tp in arguments.tp:
            for adapter in shapes.adapters(model, tp):
                for linear in shapes.linears(model, tp):
                    if linear.name not in arguments.linears:
                        continue
                    for tokens, count in [*DECODE, *PREFILL]:
                        requests = np.arange(tokens) if tokens <= 256 else np.arange(tokens) * count // tokens
                        name = {"model": model_name, "tp": tp, "linear": linear.name, "adapter": adapter.kind}
                        name |= {"rank": adapter.rank, "local_rank": adapter.local_rank}
                        name |= {"tokens": tokens, "adapters": count}
                        width = shapes.row_width(model, tp)
                        yield (
                            name,
                            build(linear, adapter.local_rank, width, requests % count, count, arguments.contiguous),
                        )


def agrees(p: Problem, run: Run) -> bool:
    """Whether one call adds what float32 algebra on the dense weights gives, within bf16 rounding of h and out."""
    before = p.out.clone()
    run(0)
    got, p_out = p.out.float(), before.float()
    p.out.copy_(before)
    size = torch.zeros_like(p_out)
    for g, adapter in enumerate(p.segments.adapters.tolist()):
        rows = torch.from_numpy(p.segments.tokens[p.segments.starts[g] : p.segments.starts[g + 1]]).long().cuda()
        a, b = p.a[0, adapter].float(), p.b[0, adapter].float()
        h, h_size = p.x[rows].float() @ a.t(), p.x[rows].float().abs() @ a.abs().t()
        for s, (start, stop) in enumerate(zip(p.out_offsets, p.out_offsets[1:], strict=False)):
            ranks = slice(s * p.rank, (s + 1) * p.rank)
            p_out[rows, start:stop] += h[:, ranks] @ b[start:stop].t()
            size[rows, start:stop] = h_size[:, ranks] @ b[start:stop].abs().t()
    # Half an ulp of h and of out each, and one of a delta that is rounded before it is added (the others do so).
    return bool(((got - p_out).abs() <= 2.0**-7 * (size + p_out.abs() + before.float().abs())).all())


def measure(p: Problem) -> dict[str, dict[str, Any]]:
    """Median and spread in microseconds of each method that can run the problem, and whether its result is right."""
    graphs, found = {}, {}
    for name, method in METHODS.items():
        run = method(p)
        if run is None:
            continue
        if not agrees(p, run):
            found[name] = {"wrong": True}
            continue
        graphs[name] = capture(run, len(p.ours))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for name in [*graphs, *reversed(graphs)]:
        times[name] += replay_times_us(graphs[name], len(p.ours))
    for name, values in times.items():
        found[name] = {"median_us": float(np.median(values)), "min_us": min(values), "max_us": max(values)}
    return found


def table_line(name: dict[str, Any], found: dict[str, dict[str, Any]], share: float) -> str:
    cells = [f"{found[m]['median_us']:.1f}" if "median_us" in found.get(m, {}) else "-" for m in METHODS]
    return "| " + " | ".join([*map(str, name.values()), *cells, f"{100 * share:.0f} %"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(shapes.MODELS), choices=list(shapes.MODELS))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--linears", nargs="+", default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--contiguous", action="store_true", help="adapters in one run of slots instead of scattered")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results/kernels_gpu.jsonl"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_kernels.py needs a GPU.")
    refuse_unless_right()
    torch.manual_seed(0)
    where = conditions() | {"slots": "contiguous" if arguments.contiguous else "scattered"}
    print(json.dumps(where))
    first = True
    with arguments.out.open("a") as file:
        for name, problem in problems(arguments):
            found = measure(problem)
            if first:
                print("| " + " | ".join([*name, *(f"{m} us" for m in METHODS), "share of copy bandwidth"]) + " |")
                print("|" + "---|" * (len(name) + len(METHODS) + 1))
                first = False
            floor_us = problem.floor_bytes / where["copy_bytes_per_s"] * 1e6
            for method, values in found.items():
                row = (
                    where | name | {"method": method, "floor_bytes": problem.floor_bytes, "floor_us": floor_us} | values
                )
                file.write(json.dumps(row) + "\n")
            file.flush()
            if "median_us" not in found["ours"]:
                raise SystemExit(f"Ours is wrong on {name}: no figures.")
            print(table_line(name, found, floor_us / found["ours"]["median_us"]), flush=True)


if __name__ == "__main__":
    main()
