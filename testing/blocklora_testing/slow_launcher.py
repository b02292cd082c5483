"""The launcher, over storage that hangs: an adapter is read once there is no file ``HOLD`` in its folder.

Run as a script; each spawned process imports it again before it imports SGLang.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from sglang_blocklora import cpu_only, launch_server
from sglang_blocklora.adapters import loading

HOLD = "HOLD"
POLL_S = 0.01


def slow_down() -> None:
    original = loading.load_shard

    def load_shard(name: str, folder: Path, *arguments: Any, **options: Any) -> Any:
        while (folder / HOLD).exists():
            time.sleep(POLL_S)
        return original(name, folder, *arguments, **options)

    loading.load_shard = load_shard


if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(2)
    slow_down()
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
