"""Launches and programs of a step's graphs, as captured on a GPU of 132 multiprocessors; no GPU is needed.

    python benchmark/kernels/launches.py [--models 8B] [--tp 1 8] [--batch 1 16 64 256] > benchmark/results/launches.md

Kernels are compiled for an H100 and their launches recorded (``blocklora_testing.kernels.no_gpu``). What a launch holds
is fixed when its graph is captured, so each figure holds for every batch that replays the graph.
"""

from __future__ import annotations

import argparse
import sys

import shapes
import torch
from blocklora_kernels.batch import BatchMetadata, Captured
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.table import AdapterTable
from blocklora_testing.kernels.no_gpu import H100, record_launches

ADAPTERS = 64  # of a batch, at most
LAYERS = {"8B": 32, "70B": 80}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["8B", "70B"], choices=list(LAYERS))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--rank", type=int, default=16, help="local rank that the graphs are captured for")
    arguments = parser.parse_args()
    recorded = record_launches()
    print(f"`{' '.join(['python', *sys.argv])}`\n")
    print("| model | TP | graph of | launches | programs a launch | programs a step |\n|---|---|---|---|---|---|")
    for name in arguments.models:
        model, layers = shapes.MODELS[name], LAYERS[name]
        for tp in arguments.tp:
            linears = [make(linear, shapes.row_width(model, tp)) for linear in shapes.linears(model, tp)]
            batch = BatchMetadata(max(arguments.batch), ADAPTERS, 3 * arguments.rank, CPU, H100["multiprocessor_count"])
            for tokens in arguments.batch:
                recorded.clear()
                batch.update_for_capture(Captured(tokens, arguments.rank))
                for linear in linears:
                    x, out = (
                        torch.zeros(tokens, n, dtype=torch.bfloat16) for n in (linear.in_features, outputs(linear))
                    )
                    linear.add_delta_(out, x, batch)
                programs = [launch.programs for launch in recorded]
                each = f"{min(programs)} to {max(programs)}"
                row = f"{layers * len(programs)} | {each} | {layers * sum(programs):,}"
                print(f"| {name} | {tp} | {tokens} requests | {row} |", flush=True)
    print("| any | any | a batch without adapters | 0 | | 0 |")


def make(linear: shapes.Linear, width: int) -> LoraLinear:
    table = AdapterTable(1, 1, 2 * ADAPTERS, 1024, CPU)
    planes = [torch.zeros(16, width, dtype=torch.bfloat16) for _ in range(2)]
    offsets = [0]
    for length in linear.outputs:
        offsets.append(offsets[-1] + length)
    tables = (table.slots, table.first_slots, table.descriptors[0, 0], table.scalings[0, 0])
    return LoraLinear(planes, *tables, linear.in_features, offsets)


def outputs(linear: LoraLinear) -> int:
    return linear.out_offsets[-1]


if __name__ == "__main__":
    main()
