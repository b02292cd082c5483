"""Stock SGLang on a CPU with its collectives counted: ``stock_server.py`` behind ``blocklora_testing.collectives``."""

from __future__ import annotations

import os
import sys

from blocklora_testing.collectives import count_collectives
from sglang_blocklora import cpu_only, settings
from sglang_blocklora.launch_server import rank_count, with_defaults

if __name__ in ("__main__", "__mp_main__"):
    os.environ[settings.SWITCH_VARIABLE] = "0"
    flags = cpu_only.prepare(rank_count(sys.argv[1:]))
    count_collectives()
    from benchmark.serving.stock_server import drop_pinning

    drop_pinning()
if __name__ == "__main__":
    from blocklora_patches.launch import run_sglang

    run_sglang(with_defaults(sys.argv[1:], flags))
