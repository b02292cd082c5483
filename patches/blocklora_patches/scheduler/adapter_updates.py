"""``managers/scheduler.py``: adapters are loaded and unloaded by request id, so that answers cannot be mistaken."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


def _answer(result: Any, self: Any, recv_req: Any) -> None:
    result.rid = recv_req.rid


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HOOKS = tuple(
    Hook(
        f"{_SCHEDULER}.{name}",
        _answer,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream's answers carry no id, so one that comes late is taken for the next one's.",
        retire_when="upstream's answers carry the id of their request",
    )
    for name in ("load_lora_adapter", "unload_lora_adapter")
)
