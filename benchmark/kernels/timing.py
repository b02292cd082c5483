"""Times on the device: a CUDA graph over all copies of the weights, replayed."""

from __future__ import annotations

import torch
from methods import Run

REPLAYS = 7


def capture(run: Run, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of ``run`` on each copy; the first call, outside the graph, compiles and tunes whatever needs it."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            run(copy)
    return graph


def replay_times_us(graph: torch.cuda.CUDAGraph, copies: int) -> list[float]:
    """Microseconds of one call, for each of REPLAYS replays after one that is not counted."""
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / copies)
    return times


def copy_bandwidth_bytes_per_s() -> float:
    """Read plus write bandwidth of a 1 GiB device copy, best of 10."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best_ms = float("inf")
    for _ in range(10):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        stop.synchronize()
        best_ms = min(best_ms, start.elapsed_time(stop))
    return 2 * source.numel() / best_ms * 1000
