"""Joins a request's adapter and its client's extra key so that they can be told apart (``schedule_batch.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.memory.prefix import request_key

from blocklora_patches.hooks.hook import Hook, Process


def _init(_: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Join the adapter and the client's own extra key so that they can be told apart; upstream just appends the id."""
    own = self.extra_key or ""
    self.extra_key = request_key(self.lora_id, own.removesuffix(self.lora_id or ""))


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
