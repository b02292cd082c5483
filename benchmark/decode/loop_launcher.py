"""The product's launcher, but the CPU path goes from adapter to adapter in every batch, as it does in large ones.

Each spawned process imports this module again before it imports SGLang. From the repository:

    python -m benchmark.decode.loop_launcher (flags as for sglang_blocklora.launch_server)
"""

from __future__ import annotations

import sys

from sglang_blocklora import cpu_only, launch_server

if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(launch_server.rank_count(sys.argv[1:]))
    from sglang_blocklora.batch import torch_adder

    torch_adder.MOST_STACKED_TOKENS = 0
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
