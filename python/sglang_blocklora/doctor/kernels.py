"""Checks the kernels' numbers on this machine's device, and that a CUDA graph of them replays with other batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_blocklora import cpu_only
from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped

if TYPE_CHECKING:
    from sglang_blocklora.doctor.problem import Problem

ADAPTERS = [(16, 1), (32, 4), (8, 2)]  # rank, nblocks
DECODE = np.tile([1, -1, 0, 2, 0, 1, 1, -1], 3)
# Tokens of a batch that a GPU cuts into its larger tiles too; the interpreter would take minutes.
PREFILL = np.repeat([2, 0, -1, 1], [300, 5, 7, 200])
# Largest relative error (Frobenius) of a delta. In bfloat16 the base layer's output is rounded once more: 2**-8.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
BROKEN = (
    "Serve with --adapter-kernels torch, and report it with this machine's device, driver, torch and triton "
    "(make bench-gpu has the kernels' own tests)."
)


def check(asked: Asked) -> Iterator[Finding]:
    """Deltas of mixed batches against float64; on a GPU in bfloat16, and replayed from a graph."""
    if cpu_only.is_cpu_only():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        yield from numbers("cpu", torch.float32, [DECODE])
        yield skipped("CUDA graph", "there is no GPU")
        return
    yield from numbers("cuda", torch.bfloat16, [DECODE, PREFILL])
    yield replayed("cuda", torch.bfloat16)


def numbers(device: str, dtype: torch.dtype, batches: list[np.ndarray]) -> Iterator[Finding]:
    """The deltas of ``batches`` (an adapter for each token) against float64, on both kinds of linears."""
    for row_parallel in (False, True):
        problem = make(row_parallel, max(map(len, batches)), dtype, device)
        worst = 0.0
        for adapters in batches:
            x, out = problem.draw(len(adapters))
            after = out.clone()
            problem.describe(adapters)
            problem.linear.add_delta_(after, x, problem.batch)
            worst = max(worst, problem.error(adapters, x, out, after))
        what = f"kernels, {'row' if row_parallel else 'column'}-parallel"
        yield judge(what, worst, dtype, "Triton's interpreter" if device == "cpu" else device)


def replayed(device: str, dtype: torch.dtype) -> Finding:
    """A graph that is captured without any adapter, and replayed with batches of other adapters."""
    from blocklora_kernels.batch import Captured  # imports triton

    problem = make(False, len(DECODE), dtype, device)
    x, out = problem.draw(len(DECODE))
    after = out.clone()
    captured = Captured(len(DECODE), 16)
    problem.batch.update_for_capture(captured)
    problem.linear.add_delta_(after, x, problem.batch)  # compiles, which a capture forbids
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.linear.add_delta_(after, x, problem.batch)
    worst = 0.0
    for adapters in (DECODE, DECODE[::-1].copy(), np.full(len(DECODE), 2)):
        after.copy_(out)
        problem.describe(adapters, captured)
        graph.replay()
        worst = max(worst, problem.error(adapters, x, out, after))
    return judge("CUDA graph", worst, dtype, "three replays")


def make(row_parallel: bool, max_tokens: int, dtype: torch.dtype, device: str) -> Problem:
    """A linear of either kind; of the sizes of a TP rank of an 8B model on a GPU, small in the interpreter."""
    from sglang_blocklora.doctor.problem import Problem, Shape  # imports triton

    small = device == "cpu"
    if row_parallel:
        shape = Shape(inputs=96 if small else 1792, outputs=(64 if small else 4096,), row_parallel=True)
    else:
        shape = Shape(inputs=64 if small else 4096, outputs=(48, 16, 16) if small else (512, 128, 128))
    return Problem(shape, ADAPTERS, max_tokens, dtype, device)


def judge(what: str, error: float, dtype: torch.dtype, where: str) -> Finding:
    """The verdict on a relative ``error``: a fault above ``TOLERANCE`` of the dtype, or where it is not a number."""
    name = str(dtype).removeprefix("torch.")
    found = f"relative error {error:.1e} against float64 ({name}, {where})"
    return ok(what, found) if error <= TOLERANCE[dtype] else fault(what, found, BROKEN)
