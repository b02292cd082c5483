"""Our kernels beside those of SGLang's csgmv and triton_v2 backends, as compiled for sm_90. Needs no GPU.

    python benchmark/kernels/compiled.py [--model 8B] [--tp 8] > benchmark/results/compiled.md

Each backend's own host code chooses its tiles for the batch and compiles (``blocklora_testing.kernels.no_gpu``);
nothing is launched. Tiles of csgmv are those that SGLang ships for an H100 where it has some for the shape.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from typing import Any
from unittest import mock

import numpy as np
import shapes
import torch
from blocklora_testing.kernels.no_gpu import H100, record_launches
from sglang_blocklora import cpu_only

CPU = torch.device("cpu")
DEVICE_NAME = "NVIDIA_H100_80GB_HBM3"
ADAPTERS = 16
BATCHES = {"decode, 64 tokens": 64, "prefill, 2048 tokens": 2048}
MOST_WARPS, MOST_BLOCKS, SHARED_BYTES, REGISTERS = 64, 32, 228 << 10, 65536  # of an H100's multiprocessor
RESERVED_BYTES = 1 << 10  # of shared memory, for each block


def ours(linear: shapes.Linear, rank: int, tokens: int, width: int) -> Callable[[], None]:
    from blocklora_kernels.batch import BatchMetadata
    from blocklora_kernels.segments import Segments
    from launches import make, outputs

    own = make(linear, width)
    batch = BatchMetadata(tokens, ADAPTERS, rank * len(linear.outputs), CPU, H100["multiprocessor_count"])
    batch.update(Segments.build(np.arange(tokens) * ADAPTERS // tokens), tokens, rank)
    x, out = (torch.zeros(tokens, n, dtype=torch.bfloat16) for n in (linear.in_features, outputs(own)))
    return lambda: own.add_delta_(out, x, batch)


def weights(linear: shapes.Linear, rank: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A [adapters, slices * rank, in], B [adapters, outputs, rank] and where each slice's outputs start and end."""
    a = torch.zeros(ADAPTERS, len(linear.outputs) * rank, linear.in_features, dtype=torch.bfloat16)
    b = torch.zeros(ADAPTERS, sum(linear.outputs), rank, dtype=torch.bfloat16)
    return a, b, np.cumsum([0, *linear.outputs]).tolist()


def csgmv(linear: shapes.Linear, rank: int, tokens: int, width: int) -> Callable[[], None]:
    from sglang.kernels.ops.lora.dense import lora_tuning_config
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    lora_tuning_config.get_device_name = lambda: DEVICE_NAME
    a, b, offsets = weights(linear, rank)
    chunk = 128 if tokens >= 256 else 32 if tokens >= 64 else 16  # ChunkedSgmvLoRABackend._determine_chunk_size
    segments = max(tokens // chunk, ADAPTERS)
    info = LoRABatchInfo(
        use_cuda_graph=False,
        bs=segments,
        num_segments=segments,
        seg_indptr=torch.zeros(segments + 1, dtype=torch.int32),
        weight_indices=torch.zeros(segments, dtype=torch.int32),
        lora_ranks=torch.full((ADAPTERS,), rank, dtype=torch.int32),
        scalings=torch.ones(ADAPTERS),
        max_len=chunk,
        seg_lens=None,
        permutation=torch.zeros(tokens, dtype=torch.int32),
    )
    x, out = (torch.zeros(tokens, n, dtype=torch.bfloat16) for n in (linear.in_features, offsets[-1]))
    on_device, on_host = torch.tensor(offsets, dtype=torch.int32), torch.tensor(offsets)

    def run() -> None:
        h = chunked_sgmv_lora_shrink_forward(x, a, info, len(linear.outputs))
        chunked_sgmv_lora_expand_forward(h, b, info, on_device, max(linear.outputs), out, on_host)

    return run


def triton_v2(linear: shapes.Linear, rank: int, tokens: int, width: int) -> Callable[[], None]:
    from sglang.kernels.ops.lora.common import lora_b
    from sglang.kernels.ops.lora.common.route_view import RouteView, RouteViewKind
    from sglang.srt.lora.dense import runner as dense_runner
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    a, b, offsets = weights(linear, rank)
    runner = DenseLoraRunner(LoraWorkspace(), max_loras=ADAPTERS, device=CPU, architecture="sm90")
    runner.begin_batch(
        token_slots=torch.zeros(tokens, dtype=torch.int32),
        lora_ranks=torch.full((ADAPTERS,), rank, dtype=torch.int32),
        scalings=torch.ones(ADAPTERS),
        num_tokens=tokens,
        phase=Phase.DECODE if tokens <= 256 else Phase.PREFILL,
        graph_mode=False,
    )
    plan = runner.plan_for(DenseLoraKind.LINEAR, rank, linear.in_features, offsets[-1], num_tokens=tokens)
    blocks = tokens // plan.block_size + ADAPTERS
    runner.route = lambda block_size: RouteView(  # what kernels of no interest here would compute on the device
        view=RouteViewKind.ALIGNED,
        block_size=block_size,
        token_slots=runner.token_slots,
        group_ids=None,
        groups_per_slot=1,
        max_loras=ADAPTERS,
        maybe_sorted_pair_ids=torch.zeros(blocks * block_size, dtype=torch.int32),
        maybe_block_bucket_ids=torch.zeros(blocks, dtype=torch.int32),
        maybe_num_pairs_post_padded=torch.zeros(1, dtype=torch.int32),
    )
    x, out = (torch.zeros(tokens, n, dtype=torch.bfloat16) for n in (linear.in_features, offsets[-1]))
    geometry = partial(lora_b._build_geometry, device=CPU, columns=tuple(offsets[:-1]))

    def run() -> None:
        h = runner.run_a(x, a, stack=len(linear.outputs), plan=plan)
        with (
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
            mock.patch.object(dense_runner, "slice_geometry", lambda rows, block, device: geometry(rows, block)),
        ):
            runner.run_b(h, b, out, offsets=tuple(offsets), plan=plan)

    return run


def collect(run: Callable[[], None], launches: list[Any]) -> Iterator[tuple[str, int, Any]]:
    """Name, programs and compiled code of each kernel that ``run`` launches."""
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    original = JITFunction.run

    def note(self: Any, *args: Any, **options: Any) -> Any:
        compiled.append(original(self, *args, **options))
        return compiled[-1]

    launches.clear()
    JITFunction.run = note
    try:
        run()
    finally:
        JITFunction.run = original
    for launch, kernel in zip(launches, compiled, strict=True):
        yield launch.kernel, launch.programs, kernel


def describe(kernel: Any) -> dict[str, Any]:
    """Columns of the table, read off the compiled code."""
    from registers import assemble

    ptx, warps = kernel.asm["ptx"], kernel.metadata.num_warps
    used = assemble(ptx, 90)
    shared = kernel.metadata.shared
    by_registers = REGISTERS // (-(-used["registers"] // 8) * 8 * 32 * warps)
    by_shared = SHARED_BYTES // (shared + RESERVED_BYTES)
    blocks = min(by_registers, by_shared, MOST_WARPS // warps, MOST_BLOCKS)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    stores, wide_stores = count(r"st\.global"), count(r"st\.global[^ ]*\.v4")
    async_16 = count(r"cp\.async\.cg\.shared\.global \[ *%[^\]]*\], \[ *%[^\]]*\], 0x10")
    return {
        "warps": warps,
        "registers": used["registers"],
        "spilled bytes": used["spill_bytes"],
        "shared KiB": f"{shared / 1024:.0f}",
        "loads of 16 B": async_16 + count(r"ld\.global[^ ]*\.v4") + count(r"cp\.async\.bulk"),
        "of 8 B": count(r"ld\.global[^ ]*\.v2\.b32") + count(r"cp\.async\.ca[^;]*0x8"),
        "of 4 B": count(r"ld\.global[^ ]*(?<!v2)(?<!v4)\.b32 ") + count(r"cp\.async\.ca[^;]*0x4"),
        "of 2 B": count(r"ld\.global[^ ]*\.b16"),
        "stores of 16 B": wide_stores,
        "of less": stores - wide_stores,
        "product": "wgmma" if "wgmma.mma" in ptx else "mma.sync" if "mma.sync" in ptx else "fma",
        "warps on a multiprocessor": f"{blocks * warps} of {MOST_WARPS}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B", choices=list(shapes.MODELS))
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 64], help="local rank")
    parser.add_argument("--linears", nargs="+", default=["qkv", "down"], help="of a layer: qkv, o, gate_up, down")
    arguments = parser.parse_args()
    cpu_only.prepare(1)  # before SGLang is imported
    launches, model = record_launches(), shapes.MODELS[arguments.model]
    print(f"`{' '.join(['python', *sys.argv])}`: SGLang {version('sglang')}, Triton {version('triton')}, bf16, sm_90\n")
    first = True
    for linear in shapes.linears(model, arguments.tp):
        if linear.name not in arguments.linears:
            continue
        for rank in arguments.rank:
            for batch, tokens in BATCHES.items():
                for method in (ours, csgmv, triton_v2):
                    run = method(linear, rank, tokens, shapes.row_width(model, arguments.tp))
                    for name, programs, kernel in collect(run, launches):
                        row = {"linear": linear.name, "rank": rank, "batch": batch, "backend": method.__name__}
                        row |= {"kernel": name.strip("_"), "programs": programs} | describe(kernel)
                        if first:
                            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
                            first = False
                        print("| " + " | ".join(map(str, row.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
