"""The launcher, its collectives counted (``blocklora_testing.collectives``). A script; COLLECTIVES_LOG names its log.

Each spawned process imports it again before it imports SGLang, which is when the counters go in.
"""

from __future__ import annotations

import sys

from sglang_blocklora import cpu_only, launch_server

from blocklora_testing.collectives import count_collectives

if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(launch_server.rank_count(sys.argv[1:]))
    count_collectives()
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
