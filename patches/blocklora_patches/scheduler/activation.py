"""Activates a request's adapter from its invocation on, or not at all (called as a request comes to the scheduler).

All TP ranks have the same tokens and adapters, so they find the same place.
"""

from __future__ import annotations

from typing import Any

from sglang_blocklora.memory.prefix import request_key, split_key
from sglang_blocklora.requests.activation import FIELD, ActivatedId, last_occurrence

from blocklora_patches.scheduler.control import pool_of


def activate(scheduler: Any, req: Any) -> None:
    """Find where in its prompt an activated adapter begins; without an invocation the base model answers, as in PEFT.

    Nothing happens to requests of other adapters, nor the second time.
    """
    if req.lora_id is None or isinstance(req.lora_id, ActivatedId):
        return
    pool = pool_of(scheduler)
    adapter = None if pool is None else pool.loaded.get(req.lora_id)
    if adapter is None or not adapter.shard.invocation:
        return
    first = last_occurrence(req.origin_input_ids, adapter.shard.invocation)
    own_extra = split_key(req.extra_key)[1]
    if first is None:
        pool.load_counts.not_activated(req.lora_id)
        req.lora_id = None
    else:
        req.lora_id = ActivatedId(req.lora_id, first)
    req.extra_key = request_key(req.lora_id, own_extra, first)
    # Upstream brings a list of a value for each token of the answer; the first is of the request (-1: no place).
    req.customized_info = {**(req.customized_info or {}), FIELD: [-1 if first is None else first]}
