"""The product's launcher, but plain adapters are split over TP ranks as S-LoRA does it. Static memory, on a CPU.

All ranks' sums go over gloo, as stock's do and S-LoRA's other collectives: what is compared is how many there are.

With COLLECTIVES_LOG in the environment collectives are counted too (``blocklora_testing.collectives``). Each spawned
process imports this module again before it imports SGLang, which is when both go in. From the repository:

    python -m benchmark.paper.s_lora.launcher (flags as for sglang_blocklora.launch_server)
"""

from __future__ import annotations

import os
import sys

from blocklora_testing.collectives import count_collectives
from sglang_blocklora import cpu_only, cpu_sum, launch_server


def install() -> None:
    """Cut plain adapters S-LoRA's way from now on, and put a collective between their shrink and expand."""
    cpu_sum.is_usable = lambda: False
    from blocklora_patches.model import lora_manager
    from sglang_blocklora.adapters import shard

    from benchmark.paper.s_lora import sharding, step

    shard.plan_linear = sharding.plan_linear
    lora_manager.TorchAdder = step.SplitStep


if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(launch_server.rank_count(sys.argv[1:]))
    if "COLLECTIVES_LOG" in os.environ:
        count_collectives()
    install()
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
