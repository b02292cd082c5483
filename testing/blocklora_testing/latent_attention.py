"""Lets SGLang's CPU engine run multi-head latent attention, in the way that it has for what was generated.

Its torch attention reads keys and values from the KV cache, where such a model has latents alone; SGLang's other way,
in which queries are multiplied into latents, needs nothing else. Which way is taken is in a registry of SGLang's.
Run as a script it does that, and then runs the one that ``RUNS`` names, which starts stock SGLang.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

RUNS = "LATENT_ATTENTION_RUNS"


def use_latents() -> None:
    """In a process that is to be a server, where SGLang can be imported."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


if __name__ in ("__main__", "__mp_main__"):  # in each spawned process too
    from sglang_blocklora import cpu_only, settings
    from sglang_blocklora.launch_server import rank_count

    os.environ[settings.SWITCH_VARIABLE] = "0"
    cpu_only.prepare(rank_count(sys.argv[1:]))
    use_latents()
    # Not with runpy, which would make that file the main module, and so the one of spawned processes.
    exec(compile(Path(os.environ[RUNS]).read_text(), os.environ[RUNS], "exec"))
