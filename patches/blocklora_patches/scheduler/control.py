"""Answers what the HTTP process asks about adapters, pins them, and checks slots when idle (``managers/scheduler.py``).

``get_internal_state`` is answered by rank 0; ``set_internal_state`` reaches every TP rank in the same order, so all of
them pin alike.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import SetInternalStateReqOutput
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.memory.pool import AdapterPool
from sglang_blocklora.reporting.facts import QUEUE_HEAD, pool_facts, tier

from blocklora_patches.hooks.hook import Hook, Process

FACTS = "blocklora"
# Key of a request to pin (1) or unpin (0): this, then the lora_id. Upstream takes names with numbers only.
PIN = "blocklora_pin:"


def pool_of(scheduler: Any) -> AdapterPool | None:
    """The adapters of a scheduler's model, or None where it serves none."""
    manager = scheduler.tp_worker.model_runner.lora_manager
    return None if manager is None else manager.pool


def note_arrival(scheduler: Any, req: Any) -> None:
    """Count a request that came into the waiting queue, and tell the eviction strategy of it."""
    pool = pool_of(scheduler)
    if pool is None:
        return
    if req.lora_id in pool.loaded:
        pool.load_counts.arrived(req.lora_id, tier(pool, req.lora_id))
    pool.arrived(req.lora_id, RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt))


def _get_internal_state(result: Any, self: Any, recv_req: Any) -> None:
    manager = self.tp_worker.model_runner.lora_manager
    if manager is None:
        return
    batches = (self.running_batch, self.last_batch)  # a prefill joins the running batch a step later
    running = {
        req.rid: req.lora_id for batch in batches if batch is not None for req in batch.reqs if not req.finished()
    }
    waiting = Counter(req.lora_id for req in self.waiting_queue)
    head = [(req.lora_id, len(req.origin_input_ids)) for req in self.waiting_queue[:QUEUE_HEAD]]
    facts = pool_facts(manager.pool, manager.slot_bytes, Counter(running.values()), waiting, head)
    result.internal_state[FACTS] = msgspec.to_builtins(facts)


def _set_internal_state(original: Any, self: Any, recv_req: Any) -> Any:
    pins = {key.removeprefix(PIN): value for key, value in recv_req.server_args.items() if key.startswith(PIN)}
    if not pins:
        return original(self, recv_req)
    pool = pool_of(self)
    reasons = [pool.set_pinned(key, bool(value)) for key, value in pins.items() if key in pool.loaded]
    return SetInternalStateReqOutput(updated=len(reasons) == len(pins) and not any(reasons))


def _on_idle(self: Any) -> None:
    pool = pool_of(self)
    if pool is not None and envs.SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK.get() and self.is_fully_idle():
        pool.check_integrity(self.pool_stats_observer.session_held_tokens())


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HOOKS = (
    Hook(
        f"{_SCHEDULER}.get_internal_state",
        _get_internal_state,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream reports no adapters.",
        retire_when="upstream lets a plugin add to the internal state",
    ),
    Hook(
        f"{_SCHEDULER}.set_internal_state",
        _set_internal_state,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Upstream pins at load time only.",
        retire_when="upstream pins a loaded adapter",
    ),
    Hook(
        f"{_SCHEDULER}.on_idle",
        _on_idle,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="Every slot has one owner (upstream's debug switch).",
        retire_when="upstream's own check asks the cache",
    ),
)
