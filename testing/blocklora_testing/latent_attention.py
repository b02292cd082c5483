"""Lets SGLang's CPU engine run multi-head latent attention, in the way that it has for what was generated.

Its torch attention reads keys and values from the KV cache, where such a model has latents alone; SGLang's other way,
in which queries are multiplied into latents, needs nothing else. Which way is taken is in a registry of SGLang's.
"""

from __future__ import annotations

from collections.abc import Callable

# Those that are compared: without a latent of queries, and with one.
FAMILIES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")


def use_latents() -> None:
    """In a process that is to be a server, where SGLang can be imported."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


def change_for(family: str) -> Callable[[], None] | None:
    """What a server of that family has to change before it starts, if anything."""
    return use_latents if family in FAMILIES else None
