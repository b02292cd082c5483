"""``managers/schedule_policy.py``: no request is admitted without its adapter."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hook import Hook
from blocklora_patches.unified_radix_cache import AdapterPrefixCache


def _add_one_req(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    cache = self.tree_cache
    if isinstance(cache, AdapterPrefixCache) and not cache.can_admit(req.lora_id):
        return AddReqResult.OTHER  # the next pass loads it again
    return original(self, req, *args, **kwargs)


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        _add_one_req,
        HookType.AROUND,
        "A running request that is preempted unlocks its adapter and evicts, after the adapters of a pass were checked "
        "and before the next request locks its own.",
    ),
)
