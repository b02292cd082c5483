"""Host time of a launch outside of a graph, up to the call of the driver; no GPU is needed.

    python benchmark/kernels/launch_host_time.py

Kernels are compiled for an H100 and the driver's part is left out (``blocklora_testing.kernels.no_gpu``). A launch
whose variant is known is compared with one that Triton's own launcher makes, in turns (A B B A), as this process's
CPU time.
"""

from __future__ import annotations

import time

import numpy as np
import shapes
import torch
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.segments import Segments
from blocklora_testing.kernels.no_gpu import record_launches
from launches import CPU, make, outputs

REPEATS = 2000
MODEL, TP = shapes.MODELS["8B"], 8


def main() -> None:
    recorded = record_launches()
    linear = make(shapes.linears(MODEL, TP)[0], shapes.row_width(MODEL, TP))
    batch = BatchMetadata(4096, 64, 48, CPU, 132)
    batch.update(Segments.build(np.arange(64) % 8), 64, 16)
    x, out = (torch.zeros(64, n, dtype=torch.bfloat16) for n in (linear.in_features, outputs(linear)))

    def known() -> None:
        linear.add_delta_(out, x, batch)

    def unknown() -> None:
        linear._shrink._compiled.clear()
        linear._expand._compiled.clear()
        linear.add_delta_(out, x, batch)

    times_us: dict[str, list[float]] = {"known": [], "found anew by Triton": []}
    for name in [*times_us, *reversed(times_us)] * 5:
        run = known if name == "known" else unknown
        run()
        start = time.process_time_ns()
        for _ in range(REPEATS // 20):
            run()
        times_us[name].append((time.process_time_ns() - start) / 1000 / (REPEATS // 20))
        recorded.clear()
    print("| variant | shrink and expand of a linear, us of host time | spread |\n|---|---|---|")
    for name, values in times_us.items():
        print(f"| {name} | {np.median(values):.0f} | {min(values):.0f} to {max(values):.0f} |")


if __name__ == "__main__":
    main()
