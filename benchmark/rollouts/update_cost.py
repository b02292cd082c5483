"""What an update of an adapter costs beyond copying its bytes, at the sizes of Llama-3.1-8B.

    python -m benchmark.rollouts.update_cost

The real code on the host: a body comes in pieces and is written and hashed as the HTTP process does it, then one TP
rank reads, checks and cuts its part into an image. Beside it, in the same rounds, the same bytes are merely copied:
into a file in memory, and out of it into memory; and hashed, which the HTTP process does in a thread of its own.
All times are of the processor, so that a machine that is busy with other work measures the same. Nothing here needs a
model's weights or a GPU; steps of the scheduler come on top.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang_blocklora import cpu_only
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.adapters.spool import Spool
from sglang_blocklora.tools.base_model import BaseSizes

from benchmark.record import Recorder

SIZES = BaseSizes(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, layers=32, vocab=128256)
RANK = 32
ROUNDS = 7
NETWORK_BYTES = 2**16  # of one piece as a connection gives them


def adapter(nblocks: int) -> tuple[dict[str, Any], bytes]:
    """Config and safetensors bytes of an adapter of all linears in bfloat16."""
    from safetensors.torch import save

    column, row = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj", "down_proj"]
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*column, *row]}
    if nblocks > 1:
        blocks = {"target_modules_bd_a": row, "target_modules_bd_b": column, "nblocks": nblocks, "match_strict": True}
        config["use_bdlora"] = blocks
    tensors = {}
    for layer in range(SIZES.layers):
        for module, (inputs, outputs) in SIZES.features().items():
            if module not in config["target_modules"]:
                continue
            room = "self_attn" if module[0] in "qkvo" else "mlp"
            name = f"base_model.model.model.layers.{layer}.{room}.{module}"
            columns = inputs // nblocks if module in row else inputs  # of A: block-diagonal there
            width = RANK // nblocks if module in column else RANK  # of B: block-diagonal there
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, dtype=torch.bfloat16)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, width, dtype=torch.bfloat16)
    return config, save(tensors)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    """``data`` as a connection gives it."""
    for start in range(0, len(data), NETWORK_BYTES):
        yield data[start : start + NETWORK_BYTES]


def receive(spool: Spool, config: dict[str, Any], data: bytes) -> Path:
    """As the HTTP process takes a body."""
    from blocklora_patches.http.tensors import take

    with spool.receive() as incoming:
        asyncio.run(take(incoming, pieces(data)))
        return incoming.finish(config)


def copy_in(data: bytes, file: Path) -> None:
    """The bytes of a body into a file, and nothing else."""

    async def run() -> None:
        with file.open("wb") as out:
            async for piece in pieces(data):
                out.write(piece)

    asyncio.run(run())


def copy_out(file: Path, size_bytes: int) -> np.ndarray:
    """As many bytes of a file as a rank's image has into memory that is new, and nothing else."""
    image = np.zeros(size_bytes, dtype=np.uint8)
    with file.open("rb") as source:
        source.readinto(image)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cpu_only.install_shims()  # before SGLang is imported
    importlib.import_module("blocklora_patches.http.tensors")  # not within a measurement
    recorder = Recorder("update_cost", 0, {"model": "Llama-3.1-8B", "LoRA rank": RANK, "dtype": "bfloat16"})
    for nblocks, tp in ((1, 1), (1, 8), (8, 8)):
        measure(recorder, nblocks, tp, arguments.rounds)
    recorder.finish()


def measure(recorder: Recorder, nblocks: int, tp: int, rounds: int) -> None:
    """One adapter at one TP size, round by round."""
    config, data = adapter(nblocks)
    spec = SIZES.spec(torch.bfloat16, 0, tp)
    spool = Spool(None, 2**31)
    beyond = []
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as plain:
        for round_ in range(rounds):
            begin = time.process_time()
            folder = receive(spool, config, data)
            received = time.process_time()
            report, local = read_adapter("a", str(folder), spec, RANK, None)
            read = time.process_time()
            if local is None:
                raise SystemExit(report.error)
            size_bytes = local.image.nbytes
            del local
            copying = time.process_time()
            copy_in(data, Path(plain.name))
            copied_in = time.process_time()
            copy_out(Path(plain.name), size_bytes)
            copied_out = time.process_time()
            hashlib.sha256(data).digest()
            hashed = time.process_time()
            spool.release(str(folder))
            for gone in spool.keep_only(()):
                for file in gone.iterdir():
                    os.unlink(file)
                gone.rmdir()
            figures = {
                "file_mib": len(data) / 2**20,
                "image_mib": size_bytes / 2**20,
                "receive_ms": (received - begin) * 1e3,
                "read_ms": (read - received) * 1e3,
                "copy_in_ms": (copied_in - copying) * 1e3,
                "copy_out_ms": (copied_out - copied_in) * 1e3,
                "hash_ms": (hashed - copied_out) * 1e3,
            }
            figures["beyond_ms"] = (read - begin - (hashed - copying)) * 1e3
            beyond.append(figures["beyond_ms"])
            recorder.add(f"n = {nblocks}, TP {tp}", "update", round_, figures)
            print(json.dumps({name: round(value, 1) for name, value in figures.items()}), flush=True)
    print(f"n = {nblocks}, TP {tp}: {statistics.median(beyond):.0f} ms beyond copying and hashing in the median")


if __name__ == "__main__":
    main()
