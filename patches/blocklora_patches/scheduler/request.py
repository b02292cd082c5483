"""``managers/schedule_batch.py``: a request without an adapter cannot name one by its extra key."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process

# Ends the extra key of base-model requests; an adapter's id, hex digits that upstream appends, cannot end so.
BASE_MARK = "|"


def _init(_: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if self.lora_id is None and self.extra_key:
        self.extra_key += BASE_MARK


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_batch.Req.__init__",
        _init,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="A client's extra_key that is an adapter's id would share its KV.",
        retire_when="upstream tells them apart",
    ),
)
