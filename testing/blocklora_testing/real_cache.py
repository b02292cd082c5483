"""The cache in which adapters are prefixes, on SGLang's real tree and allocator."""

from __future__ import annotations

import hashlib
import os
import warnings
from array import array
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.prefix import request_key

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
    from blocklora_patches.scheduler import request
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.sampling.sampling_params import SamplingParams


def new_cache(
    page_size: int,
    pool_tokens: int,
    *,
    events: bool = False,
    policy: str = "lru",
    core: str = "rust",
    kind: type[UnifiedRadixCache] = AdapterPrefixCache,
    device: str = "cpu",
) -> AdapterPrefixCache:
    """A cache over a pool of ``pool_tokens`` slots, as SGLang's registry builds it.

    core  which of upstream's trees: ``rust``, or ``python``, which it falls back to
    kind  may be upstream's own cache
    """
    arguments = (torch.float32, device, None, False)
    if page_size == 1:
        allocator = TokenToKVPoolAllocator(pool_tokens, *arguments)
    else:
        allocator = PagedTokenToKVPoolAllocator(pool_tokens, page_size, *arguments)
    requests = ReqToTokenPool(size=8, max_context_len=64, device=device, enable_memory_saver=False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        eviction_policy=policy,
        enable_kv_cache_events=events,
        tree_core_backend=core,
        tree_components=(ComponentType.FULL,),
    )
    return kind(params)


def request_of(
    tokens: Iterable[int],
    lora_id: str | None = None,
    own_extra: str | None = None,
    salt: str | None = None,
    activated_from: int | None = None,
) -> Req:
    """A request as the scheduler makes it of what a client sends, hooks and all.

    activated_from  where its adapter, an activated one, was found to begin
    """
    made = Req(
        "1", "", array("q", tokens), SamplingParams(), lora_id=lora_id, extra_key=own_extra or None, cache_salt=salt
    )
    for hook in request.HOOKS:
        hook.handler(None, made)
    if activated_from is not None:
        made.extra_key = request_key(lora_id, own_extra, activated_from)
    return made


def key_of(
    tokens: Iterable[int],
    lora_id: str | None = None,
    own_extra: str | None = None,
    salt: str | None = None,
    activated_from: int | None = None,
) -> RadixKey:
    """The key with which SGLang looks such a request up."""
    made = request_of(tokens, lora_id, own_extra, salt, activated_from)
    return RadixKey(made.origin_input_ids, made.extra_key, cache_salt=made.cache_salt)


def digest(text: str) -> str:
    """A content hash for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()


def scheduler_over(cache: Any, pool: Any, **more: Any) -> SimpleNamespace:
    """What our order of the queue and its admission ask of a scheduler, which has ``cache``, ``pool`` and ``more``."""
    manager = SimpleNamespace(pool=pool, decisions=DecisionLog(None, 0), validate_lora_batch=pool.bring_in)
    asked = {
        "tree_cache": cache,
        "enable_hierarchical_cache": False,
        "enable_priority_scheduling": False,
        "schedule_low_priority_values_first": False,
        "chunked_prefill_size": 100_000,
        "tp_worker": SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager)),
        "lora_drainer": None,
    }
    return SimpleNamespace(**asked | more)
