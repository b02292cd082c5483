"""The product's launcher, but it serves the architecture named in TRIED_ARCHITECTURE too, as if it were known.

Each spawned process imports this module again before it imports SGLang.
"""

from __future__ import annotations

import os
import sys

from sglang_blocklora import cpu_only, launch_server

if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(launch_server.rank_count(sys.argv[1:]))
    from sglang_blocklora.sharding import architectures

    architectures.ARCHITECTURES += (os.environ["TRIED_ARCHITECTURE"],)
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
