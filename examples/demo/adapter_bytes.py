"""How many bytes of an adapter one tensor-parallel rank holds, from the adapter's configuration and tensor shapes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def bytes_per_rank(path: Path, tp: int) -> int:
    """Return the bytes that the largest shard of the adapter at ``path`` has on ``tp`` ranks, in the file's own dtype.

    A column-parallel module keeps the blocks that its output rows touch: their rows of A, and its own rows of B. A
    row-parallel module keeps the blocks that its input columns touch: its own columns of A, and their columns of B.
    """
    config = json.loads((path / "adapter_config.json").read_text())
    nblocks = (config["use_bdlora"] or {"nblocks": 1})["nblocks"]
    totals = [0] * tp
    with safe_open(path / "adapter_model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
            if ".lora_A." not in name:
                continue
            a = weights.get_slice(name)
            b = weights.get_slice(name.replace(".lora_A.", ".lora_B."))
            itemsize = weights.get_tensor(name).element_size()
            (rank, a_columns), (out_size, _) = a.get_shape(), b.get_shape()
            column_parallel = any(module in name for module in COLUMN_PARALLEL)
            # The axis that TP splits, full size: outputs of a column-parallel module, inputs of a row-parallel one.
            split_size = out_size if column_parallel else a_columns * nblocks
            whole_size = a_columns if column_parallel else out_size
            for tp_rank in range(tp):
                start, stop = tp_rank * split_size // tp, (tp_rank + 1) * split_size // tp
                touched = -(-stop * nblocks // split_size) - start * nblocks // split_size
                values = (stop - start + touched * whole_size) * rank // nblocks
                totals[tp_rank] += values * itemsize
    return max(totals)
