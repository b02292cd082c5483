"""The cache in which adapters are prefixes, on SGLang's real tree and allocator."""

from __future__ import annotations

import hashlib
import os
import warnings

import torch

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache


def new_cache(
    page_size: int,
    pool_tokens: int,
    *,
    events: bool = False,
    policy: str = "lru",
    kind: type[UnifiedRadixCache] = AdapterPrefixCache,
) -> AdapterPrefixCache:
    """A cache over a pool of ``pool_tokens`` slots, as SGLang's registry builds it; ``kind`` may be upstream's own."""
    arguments = (torch.float32, "cpu", None, False)
    if page_size == 1:
        allocator = TokenToKVPoolAllocator(pool_tokens, *arguments)
    else:
        allocator = PagedTokenToKVPoolAllocator(pool_tokens, page_size, *arguments)
    requests = ReqToTokenPool(size=8, max_context_len=64, device="cpu", enable_memory_saver=False)
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=requests,
        token_to_kv_pool_allocator=allocator,
        page_size=page_size,
        eviction_policy=policy,
        enable_kv_cache_events=events,
        tree_components=(ComponentType.FULL,),
    )
    return kind(params)


def digest(text: str) -> str:
    """A content hash for ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()
