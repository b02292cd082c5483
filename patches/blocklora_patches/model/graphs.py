"""Has decode graphs captured without adapters too (``runner/decode_cuda_graph_runner.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


def _init(self: Any, model_runner: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if model_runner.lora_manager is None:
        return None
    return (self, model_runner, *args), kwargs | {"record_nolora_graph": True}


HOOKS = (
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.__init__",
        _init,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="A batch without adapters replays a graph in which nothing of ours is launched.",
        retire_when="all supported releases ask the manager of adapters (0.5.23 asks its backend)",
    ),
)
