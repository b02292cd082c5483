"""Admits no request without its adapter, and preempts none for nothing (``managers/schedule_policy.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
from blocklora_patches.hooks.hook import Hook, Process


def _add_one_req(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    cache = self.tree_cache
    if isinstance(cache, AdapterPrefixCache) and not cache.can_admit(req.lora_id):
        return AddReqResult.OTHER  # the next pass loads it again
    return original(self, req, *args, **kwargs)


def _preempt_to_schedule(original: Any, self: Any, req: Any) -> Any:
    cache = self.tree_cache
    if not isinstance(cache, AdapterPrefixCache):
        return original(self, req)
    with cache.keeping(req.lora_id):
        return original(self, req)


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        _add_one_req,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="A running request that is preempted unlocks its adapter and evicts, after the adapters of a "
        "pass were checked and before the next request locks its own.",
        retire_when="upstream checks adapters after it preempts",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule",
        _preempt_to_schedule,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Slots of the adapter that a request is about to lock look free to it. Where it then does not "
        "fit, upstream forgets the requests that were preempted for it.",
        retire_when="upstream queues them again",
    ),
)
