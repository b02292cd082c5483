"""Calls into SGLang's cache, for tests and simulators, that its releases spell in different ways.

0.5.21 carries the slots of a match in its result and on the request; later releases collect them from the tree's path.
"""

from __future__ import annotations

import os
import warnings
from importlib.metadata import version
from typing import Any

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from sglang.srt.mem_cache import common
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchResult
    from sglang.srt.mem_cache.radix_cache import RadixKey

_RELEASE = version("sglang")
_FIRST = _RELEASE == "0.5.21"
# Whether pages of several slots can be had on a CPU: 0.5.21's allocator has a Triton kernel only.
HAS_PAGES_ON_A_CPU = not _FIRST
HAS_MEGAKERNELS = _RELEASE not in ("0.5.21", "0.5.22")
# Tokens whose KV the overlap schedule computes beyond an answer; since 0.5.22 it knows a step ahead where that ends.
KV_BEYOND_ANSWER = 1 if _FIRST else 0
# Fields of requests that hold integers, none of them tokens: positions that clients may not give, addresses.
_SINCE_0_5_22 = {
    "EmbeddingReqInput.decision_layout",
    "AnthropicMessagesRequest.bootstrap_room",
    "AnthropicMessagesRequest.bootstrap_port",
}
LATER_INTEGERS = set() if _FIRST else _SINCE_0_5_22


def matched_slots(cache: Any, found: MatchResult) -> torch.Tensor:
    """Slots of the tokens that a match found."""
    if _FIRST:
        return found.device_indices
    return cache.path_device_indices(found.last_device_node)[: found.device_prefix_len]


def insert_params(key: RadixKey, value: torch.Tensor, known: int, *, again: bool = False) -> InsertParams:
    """Parameters of an insert of whose tokens the request has ``known`` locked; ``again``: by an insert of its own."""
    if _FIRST:
        return InsertParams(key=key, value=value, prev_prefix_len=known, chunked=again)
    return InsertParams(key=key, value=value, prev_prefix_len=known, inserted_len=known if again else 0)


def lock_match(cache: Any, request: Any) -> None:
    """Lock what a request was matched with."""
    if _FIRST:
        request.lock_receipt = cache.inc_lock_ref(request.last_node).to_dec_params()
    else:
        request.lock = cache.lock(request.last_node)


def unlock_match(cache: Any, request: Any) -> None:
    """Undo ``lock_match``, or the admission that locked the match."""
    if _FIRST:
        cache.dec_lock_ref(request.last_node, request.lock_receipt)
    else:
        cache.unlock(request.lock)


def extent(request: Any) -> tuple[int, int]:
    """Which tokens an admitted request computes next: from, to."""
    return tuple(request.extend_range) if _FIRST else (request.prefix_len, request.extend_end)


def prefix_slots(cache: Any, request: Any) -> torch.Tensor:
    """Slots of the tokens before those: its row's, where it has one already, else those of its match."""
    if _FIRST:
        return request.prefix_indices
    if request.kv.holds_kv:
        return cache.req_to_token_pool.req_to_token[request.kv.req_pool_idx, : request.prefix_len]
    return cache.prefix_device_indices(request)


def keep_computed(cache: Any, request: Any, *, more_prompt: bool = False) -> None:
    """What the scheduler does with a request that goes on: what it has computed goes into the tree."""
    if _FIRST:
        common.maybe_cache_unfinished_req(request, cache, chunked=more_prompt)
    else:
        common.checkpoint_kv_cache(request, cache)


def release(cache: Any, request: Any, *, keep: bool = True) -> None:
    """What the scheduler does with a request that ends (``keep``) or is retracted."""
    common.release_kv_cache(request, cache, **{"is_insert" if _FIRST else "checkpoint": keep})
