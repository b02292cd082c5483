"""Counting what the ranks of a real server exchange: every torch.distributed call inside a forward.

``count_collectives`` goes into the main module of a launcher, before SGLang is imported, so that each spawned process
does it too. The file named by COLLECTIVES_LOG gets one JSON line a forward and rank.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from sglang_blocklora.cpu_sum import SharedSum
from torch.utils.flop_counter import FlopCounterMode

NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_object",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all",
    "all_to_all_single",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "gather",
    "scatter",
    "send",
    "recv",
    "isend",
    "irecv",
)
# Position of the tensor that a rank contributes, where it is not the first argument.
INPUT = {"all_gather": 1, "all_gather_into_tensor": 1, "all_gather_single": 1}


def environment(log: Path) -> dict[str, str]:
    """What a counting launcher needs: the name of its log, and a path on which it finds this package."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"COLLECTIVES_LOG": str(log), "PYTHONPATH": os.pathsep.join(paths)}


def flop_counter() -> contextlib.AbstractContextManager[FlopCounterMode | None]:
    """torch's counter of floating-point operations, where it is asked for."""
    if os.environ.get("COUNT_FLOPS") != "1":
        return contextlib.nullcontext()
    # Not in torch's table, and what the torch path uses.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})


def addmm_flops(out: Sequence[int], a: Sequence[int], b: Sequence[int], **_: object) -> int:
    """Of ``out + a @ b``, from the shapes, as torch counts it: without the addition."""
    return 2 * a[0] * a[1] * b[1]


def count_collectives() -> None:
    """Wrap torch.distributed's functions and SGLang's forward. A line of the log:

    rank, mode ("EXTEND", "DECODE"), tokens; adapters: requests with one; names: distinct adapters;
    calls: function -> number; input_bytes: function -> bytes of the tensors that the rank put in;
    flops: of matrix products, only with COUNT_FLOPS=1 (it slows a forward down several times).
    """
    calls: collections.Counter = collections.Counter()
    input_bytes: collections.Counter = collections.Counter()

    def counting(name, original, position):
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            calls[name] += 1
            if len(args) > position and isinstance(args[position], torch.Tensor):
                input_bytes[name] += args[position].nbytes
            return original(*args, **kwargs)

        return wrapper

    for name in NAMES:
        if hasattr(dist, name):
            setattr(dist, name, counting(name, getattr(dist, name), INPUT.get(name, 0)))
    # Ours in place of an all-reduce on a CPU.
    SharedSum.all_reduce_ = counting("all_reduce", SharedSum.all_reduce_, 1)

    # Only now: SGLang takes some of these functions by name when it is imported.
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_parallel

    forward = ModelRunner.forward

    @functools.wraps(forward)
    def logged(self, forward_batch, *args, **kwargs):
        before, bytes_before = collections.Counter(calls), collections.Counter(input_bytes)
        with flop_counter() as flops:
            result = forward(self, forward_batch, *args, **kwargs)
        used = [key for key in forward_batch.lora_ids or [] if key is not None]
        line = {
            "rank": get_parallel().tp_rank,
            "mode": forward_batch.forward_mode.name,
            "tokens": len(forward_batch.input_ids),
            "adapters": len(used),
            "names": sorted({self.lora_manager.lora_refs[key].lora_name for key in used}),
            "calls": dict(calls - before),
            "input_bytes": dict(input_bytes - bytes_before),
            "flops": flops.get_total_flops() if flops else None,
        }
        with open(os.environ["COLLECTIVES_LOG"], "a") as log:
            log.write(json.dumps(line) + "\n")
        return result

    ModelRunner.forward = logged
