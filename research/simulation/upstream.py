"""SGLang's own classes, imported on a machine without a GPU. Everything the simulator drives comes through here."""

from __future__ import annotations

import os
import warnings

from sglang_blocklora import cpu_only

from research.simulation.costs import PAGE_TOKENS

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
# Upstream's thresholds in tokens, as pages: defaults are 32, 32 and 4096 tokens.
os.environ["IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD"] = str(32 // PAGE_TOKENS)
os.environ["IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD"] = str(32 // PAGE_TOKENS)
os.environ["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = str(4096 // PAGE_TOKENS)
cpu_only.install_shims()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    import sglang.srt.managers.schedule_batch as schedule_batch
    import torch
    from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
    from blocklora_patches.scheduler import queue_order as affinity_policy
    from blocklora_patches.scheduler import request
    from blocklora_patches.scheduler.activation import activate
    from blocklora_patches.scheduler.queue_order import AdapterAffinityPolicy
    from sglang.srt.lora.eviction_policy import LRUEvictionPolicy
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import EMPTY_SLOT, LoRAMemoryPool
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder, SchedulePolicy
    from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.common import evict_from_tree_cache
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_cache.components import ComponentType
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
    from sglang.srt.runtime_context import get_context
    from sglang.srt.sampling.sampling_params import SamplingParams

__all__ = [
    "EMPTY_SLOT",
    "AdapterAffinityPolicy",
    "AdapterPrefixCache",
    "AddReqResult",
    "LRUEvictionPolicy",
    "LoRAManager",
    "LoRAMemoryPool",
    "NewTokenRatioTracker",
    "PrefillAdder",
    "RadixKey",
    "Req",
    "SamplingParams",
    "ScheduleBatch",
    "SchedulePolicy",
    "UnifiedRadixCache",
    "activate",
    "affinity_policy",
    "evict_from_tree_cache",
    "name_adapter",
    "new_cache",
    "schedule_batch",
]

torch.set_num_threads(1)  # its tensors are small
get_context().override_server_args(device="cpu").install()  # what upstream's code reads its configuration from


def name_adapter(req: Req) -> None:
    """Do what the extension's hooks do to a request that SGLang has made."""
    for hook in request.HOOKS:
        hook.handler(None, req)


def new_cache(cache_class: type[UnifiedRadixCache], slots: int, requests: int, longest: int) -> UnifiedRadixCache:
    """A radix cache over ``slots`` slots, as SGLang's registry builds it; ``longest`` is a request's most tokens."""
    params = CacheInitParams(
        disable=False,
        req_to_token_pool=ReqToTokenPool(
            size=requests, max_context_len=longest, device="cpu", enable_memory_saver=False
        ),
        token_to_kv_pool_allocator=TokenToKVPoolAllocator(slots, torch.bfloat16, "cpu", None, False),
        page_size=1,
        tree_components=(ComponentType.FULL,),
    )
    return cache_class(params)
