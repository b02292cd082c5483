"""The launcher, with every torch.distributed call inside a forward counted and written as JSON lines.

Run as a script; each spawned process imports it again before it imports SGLang, which is when the counters go in.
The file is named by COLLECTIVES_LOG; one line a forward: rank, mode, tokens, adapters, and calls by name.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import sys

from sglang_blocklora import cpu_only, launch_server

NAMES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce_scatter",
    "reduce_scatter_tensor",
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
calls: collections.Counter = collections.Counter()


def count_collectives() -> None:
    import torch.distributed as dist
    from sglang.srt.model_executor.model_runner import ModelRunner

    def counting(name, original):
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            calls[name] += 1
            return original(*args, **kwargs)

        return wrapper

    for name in NAMES:
        setattr(dist, name, counting(name, getattr(dist, name)))
    forward = ModelRunner.forward

    @functools.wraps(forward)
    def logged(self, forward_batch, *args, **kwargs):
        before = collections.Counter(calls)
        result = forward(self, forward_batch, *args, **kwargs)
        line = {
            "rank": self.tp_rank,
            "mode": forward_batch.forward_mode.name,
            "tokens": len(forward_batch.input_ids),
            "adapters": sum(key is not None for key in forward_batch.lora_ids),
            "calls": dict(calls - before),
        }
        with open(os.environ["COLLECTIVES_LOG"], "a") as log:
            log.write(json.dumps(line) + "\n")
        return result

    ModelRunner.forward = logged


if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(2)
    count_collectives()
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
