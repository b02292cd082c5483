"""Builds the radix cache of ``--radix-cache-backend blocklora`` (``mem_cache/registry.py``)."""

from __future__ import annotations

from functools import cache

from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache
from sglang.srt.mem_cache.registry import (
    TreeCacheBuildContext,
    create_unified_radix_cache,
    default_radix_cache_factory,
    register_radix_cache_backend,
)
from sglang_blocklora.memory.eviction import STRATEGIES
from sglang_blocklora.settings import Settings

from blocklora_patches.cache.unified_radix_cache import AdapterPrefixCache
from blocklora_patches.model.unsupported import BACKEND_NAME


def build_cache(context: TreeCacheBuildContext) -> BasePrefixCache:
    """The radix cache of a scheduler, bound to the adapters of its model runner; upstream's where these live elsewhere.

    The launcher names this backend before it is known whether unified memory holds the model.
    """
    if Settings.required().adapter_memory == "static":
        return default_radix_cache_factory(context)
    cache = create_unified_radix_cache(context, cache_class=AdapterPrefixCache)
    pool = context.tp_worker.model_runner.lora_manager.pool
    cache.decisions = pool.decisions
    cache.strategy = STRATEGIES[Settings.required().adapter_eviction]()
    pool.bind_cache(cache)
    return cache


@cache
def register() -> None:
    """Make the backend known, before the command line is read."""
    register_radix_cache_backend(BACKEND_NAME, build_cache)
