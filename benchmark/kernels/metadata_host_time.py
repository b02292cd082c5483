"""Host time of one step's metadata: ``Segments.build`` and ``BatchMetadata.update``, 256 requests on 64 adapters.

    python benchmark/kernels/metadata_host_time.py

Runs without a GPU (the copy is then a copy in host memory). Adapters are drawn from Zipf(1.2) and evenly, seed 0.
"""

from __future__ import annotations

import platform
import time

import numpy as np
import torch
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.segments import Segments

REQUESTS = 256
ADAPTERS = 64
REPEATS = 2000


def batches() -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Adapter of each request and its tokens (None: one each)."""
    rng = np.random.default_rng(0)
    even = rng.permutation(np.arange(REQUESTS) % ADAPTERS)
    zipf = np.minimum(rng.zipf(1.2, REQUESTS) - 1, ADAPTERS) - 1  # -1: the base model
    return {
        "decode, even": (even, None),
        "decode, Zipf": (zipf, None),
        "prefill of 8 to 64 tokens, even": (even, rng.integers(8, 65, REQUESTS)),
    }


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    print(f"{REQUESTS} requests on {ADAPTERS} adapters, {REPEATS} repeats, device {device}")
    print("| batch | median us | 5th to 95th percentile us |\n|---|---|---|")
    for name, (adapters, counts) in batches().items():
        tokens = REQUESTS if counts is None else int(counts.sum())
        batch = BatchMetadata(REQUESTS * 64, ADAPTERS, 64, device)
        times_us = []
        for _ in range(REPEATS):
            start = time.perf_counter_ns()
            batch.update(Segments.build(adapters, counts), tokens, 16)
            times_us.append((time.perf_counter_ns() - start) / 1000)
        low, median, high = np.percentile(times_us[REPEATS // 10 :], [5, 50, 95])
        print(f"| {name} | {median:.0f} | {low:.0f} to {high:.0f} |")


if __name__ == "__main__":
    main()
