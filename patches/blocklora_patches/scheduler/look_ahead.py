"""``managers/scheduler.py``: adapters of requests near the head of the waiting queue are fetched while a batch runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.scheduler.queue_order import AdapterAffinityPolicy

# Waiting requests whose adapters are read from disk ahead, and for which nothing they need is evicted here.
HEAD_REQUESTS = 32
# Those of them whose adapters are brought into the arena ahead. There a place costs another adapter's or KV's: what
# comes for a request far down the queue is evicted again before it is used (docs/scheduler.md).
ARENA_HEAD_REQUESTS = 4


def _get_new_batch_prefill(result: Any, self: Any, running_batch: Any) -> None:
    """The waiting queue holds, in order, what this pass did not admit.

    Reads from disk are started for all of the head; they run in the background. Into the arena goes one adapter a step,
    from host memory: a read that goes on would have to be waited for.
    """
    manager = self.tp_worker.model_runner.lora_manager
    if manager is None or not isinstance(self.policy, AdapterAffinityPolicy):
        return
    pool, head = manager.pool, self.waiting_queue[:HEAD_REQUESTS]
    pool.prefetch(dict.fromkeys(req.lora_id for req in head if req.lora_id is not None))
    first = next((req.lora_id for req in head[:ARENA_HEAD_REQUESTS] if _can_be_loaded(pool, req.lora_id)), None)
    if first is None:
        return
    batches = [batch.reqs for batch in (result.running_batch, result.batch_to_run) if batch is not None]
    parked = [self.chunked_req] if self.chunked_req is not None else []
    spare = sum(len(reqs) for reqs in batches) * self.page_size  # what their next step may take
    if manager.unified and not self.tree_cache.has_room(first, spare):
        return  # nothing need be locked to know that
    keep = {req.lora_id for reqs in (*batches, parked, head) for req in reqs if req.lora_id is not None}
    with _keeping(self.tree_cache, head) if manager.unified else nullcontext():
        if pool.load_ahead(first, keep, spare):
            manager.decisions.record("ahead", adapter=pool.loaded[first].name)


def _keeping(cache: Any, waiting: list[Any]) -> AbstractContextManager[None]:
    """Nothing that these requests have in the tree is evicted meanwhile: adapters and matched prefixes."""
    matched = [req.last_node for req in waiting if req.last_node is not None]
    return cache.keeping([*matched, *cache.nodes_of(dict.fromkeys(req.lora_id for req in waiting))])


def _can_be_loaded(pool: Any, key: str | None) -> bool:
    return key in pool.loaded and not pool.is_resident(key) and pool.images.in_host_memory(key)


HOOKS = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill",
        _get_new_batch_prefill,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream loads an adapter when a batch needs it, and the batch waits.",
        retire_when="upstream reads adapters ahead of the queue",
    ),
)
