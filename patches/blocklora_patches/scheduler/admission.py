"""Admits requests whose adapters fit, and refuses at once what never will (``managers/scheduler.py``).

Upstream bounds a request by the whole pool. Less is left beside adapters: a request that was let in all the same would
wait for ever, and everything behind it too. Requests whose adapter could not be read are refused when that is known,
and adapters that host memory lacks are read before it is their requests' turn.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.scheduler.activation import activate
from blocklora_patches.scheduler.control import note_arrival, pool_of
from blocklora_patches.scheduler.queue_order import adapter_fits
from blocklora_patches.scheduler.sessions import refuse_other_kv

# Waiting requests whose adapters are read from disk ahead.
HEAD_REQUESTS = 32


def _taken_by_adapters(scheduler: Any, req: Any) -> int:
    """Slots that no eviction can free while ``req`` runs: its own adapter's and those of pinned ones."""
    pool = pool_of(scheduler)
    return 0 if pool is None else pool.slots_held_for(req.lora_id)


def _room(scheduler: Any, req: Any) -> int:
    """Tokens that ``req`` could generate if it ran alone; none where it cannot run at all."""
    page = scheduler.page_size
    prompt = -(-len(req.origin_input_ids) // page) * page
    drafts = 0 if scheduler.spec_algorithm.is_none() else get_alloc_reserve_per_decode()
    # PrefillAdder adds a page for rounding, and wants more slots than it needs.
    return int(scheduler.max_total_num_tokens - _taken_by_adapters(scheduler, req) - prompt - drafts - page - 1)


def _init_req_max_new_tokens(self: Any, req: Any) -> None:
    activate(self, req)
    if _taken_by_adapters(self, req):
        wanted, room = req.sampling_params.max_new_tokens, max(_room(self, req), 0)
        req.sampling_params.max_new_tokens = room if wanted is None else min(wanted, room)


def _add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
    activate(self, req)
    if not is_retracted:
        refuse_other_kv(req)
    taken = _taken_by_adapters(self, req)
    if taken and not req.output_ids and _room(self, req) <= 0:
        message = (
            f"The prompt of {len(req.origin_input_ids)} tokens can never run: of the KV pool's "
            f"{self.max_total_num_tokens} slots, its adapter and pinned ones take {taken}. Shorten it, unpin adapters "
            "or enlarge the pool."
        )
        _refuse(req, message)
    elif not is_retracted and getattr(req, "token_indices_to_pool", None) and _is_on_head(self, req):
        _refuse(req, "Scores at positions of a prompt are not computed with an adapter that is on lm_head.")
    elif not is_retracted:
        note_arrival(self, req)


def _refuse(req: Any, message: str) -> None:
    req.lora_id = req.extra_key = None  # what is left of it is one token, and no adapter may delay it
    req.set_finish_with_abort(message)


def _is_on_head(scheduler: Any, req: Any) -> bool:
    pool = pool_of(scheduler)
    return pool is not None and req.lora_id in pool.loaded and "head" in pool.loaded[req.lora_id].shard.parts


def _has_room(scheduler: Any, req: Any) -> bool:
    """Whether a request can run beside pins that came after it was queued, shortened where it must be."""
    if _taken_by_adapters(scheduler, req):
        room = _room(scheduler, req)
        if room <= len(req.output_ids):  # others overtake it until the pins go
            return False
        req.sampling_params.max_new_tokens = min(req.sampling_params.max_new_tokens, room)
    return True


def _can_schedule_lora_req(original: Any, self: Any, req: Any, running_loras: Any) -> bool:
    if self.chunked_req is not None:  # it may pause for a while, and its adapter must not give way meanwhile
        running_loras = running_loras | {self.chunked_req.lora_id}
    return adapter_fits(
        self, req, running_loras, lambda: _has_room(self, req), lambda: bool(original(self, req, running_loras))
    )


def _get_new_batch_prefill_raw(self: Any, prefill_delayer_single_pass: Any, running_batch: Any) -> None:
    if running_batch.is_empty():
        running_batch.batch_is_full = False


def _get_new_batch_prefill(result: Any, self: Any, running_batch: Any) -> None:
    """After the pass over the waiting queue, which now holds, in order, what was not admitted.

    Requests that wait for an adapter that could not be read are answered; then the adapters of those at the head are
    read ahead, in the background.
    """
    pool = pool_of(self)
    if pool is None:
        return
    failures = pool.images.take_failures()
    if failures:
        refused = [req for req in self.waiting_queue if req.lora_id in failures]
        self.waiting_queue = [req for req in self.waiting_queue if req.lora_id not in failures]
        for req in refused:
            req.set_finish_with_abort(failures[req.lora_id])
            self.retire_unadmitted_request(req)
    waiting = dict.fromkeys(req.lora_id for req in self.waiting_queue if req.lora_id is not None)
    pool.images.drop_unwanted(waiting)
    pool.prefetch(dict.fromkeys(r.lora_id for r in self.waiting_queue[:HEAD_REQUESTS] if r.lora_id is not None))


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HOOKS = (
    Hook(
        f"{_SCHEDULER}.init_req_max_new_tokens",
        _init_req_max_new_tokens,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="Upstream shortens answers to what the whole pool holds; with its adapter in it, less is left.",
        retire_when="upstream asks the cache what a request can have",
    ),
    Hook(
        f"{_SCHEDULER}._add_request_to_queue",
        _add_request_to_queue,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="Upstream checks a prompt against the whole pool; with its adapter in the pool too it might wait for ever. "
        "And it counts no hits, misses and reuse per adapter.",
        retire_when="upstream asks the cache what a request can have",
    ),
    Hook(
        f"{_SCHEDULER}.can_schedule_lora_req",
        _can_schedule_lora_req,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Upstream stops at the first request without room, and pins can leave one without room for long; "
        "and it knows no bound to passing over a request whose adapter does not fit.",
        retire_when="upstream passes over a request, at most so many times",
    ),
    Hook(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        _get_new_batch_prefill_raw,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="Upstream calls a batch full when there is no room, and clears that when a running request ends; "
        "there may be none where pinned adapters took the room.",
        retire_when="upstream clears it when slots come free",
    ),
    Hook(
        f"{_SCHEDULER}.get_new_batch_prefill",
        _get_new_batch_prefill,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream keeps all adapters in host memory: it never reads one again, and never fails to.",
        retire_when="upstream has a tier of adapters below host memory",
    ),
)
