"""``managers/scheduler.py``: a request that can never run with its adapter is refused at once."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hook import Hook


def _add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
    manager = self.tp_worker.model_runner.lora_manager
    if manager is None or not manager.unified or req.lora_id not in manager.pool.loaded:
        return
    adapter = manager.pool.loaded[req.lora_id]
    needed = manager.pool.cache.slots_needed(adapter.slots) + len(req.origin_input_ids) + 1
    if needed > self.max_total_num_tokens:
        req.set_finish_with_abort(
            f"The prompt of {len(req.origin_input_ids)} tokens and adapter {adapter.name!r} of {adapter.slots} slots "
            f"need {needed} slots; the KV pool has {self.max_total_num_tokens}."
        )


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        _add_request_to_queue,
        HookType.BEFORE,
        "Upstream checks a prompt against the whole pool; with its adapter in the pool too it might wait for ever.",
    ),
)
