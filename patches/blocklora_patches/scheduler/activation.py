"""Finds whose KV a request has: its adapter's contents', from an invocation on, or the base model's.

Called as a request comes to the scheduler. All TP ranks have the same tokens and adapters, so they find the same.
"""

from __future__ import annotations

from typing import Any

from sglang_blocklora.memory.prefix import request_key, split_key
from sglang_blocklora.requests.activation import FIELD, ActivatedId, last_occurrence

from blocklora_patches.scheduler.control import pool_of


def activate(scheduler: Any, req: Any) -> None:
    """File the request's KV under its adapter, and find where in its prompt an activated adapter begins.

    Without an invocation the base model answers, as in PEFT. Nothing happens the second time.
    """
    if req.lora_id is None or isinstance(req.lora_id, ActivatedId):
        return
    pool = pool_of(scheduler)
    adapter = None if pool is None else pool.loaded.get(req.lora_id)
    if adapter is None:
        return
    own_extra, owner = split_key(req.extra_key)[1], pool.kv_owner(req.lora_id)
    if not adapter.shard.invocation:
        req.extra_key = request_key(owner, own_extra)
        return
    first = last_occurrence(req.origin_input_ids, adapter.shard.invocation)
    if first is None:
        pool.load_counts.not_activated(req.lora_id)
        req.lora_id, owner = None, None
    else:
        req.lora_id = ActivatedId(req.lora_id, first)
    req.extra_key = request_key(owner, own_extra, first)
    # Upstream brings a list of a value for each token of the answer; the first is of the request (-1: no place).
    req.customized_info = {**(req.customized_info or {}), FIELD: [-1 if first is None else first]}
