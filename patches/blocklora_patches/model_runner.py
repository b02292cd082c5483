"""``model_executor/model_runner.py``: the KV pool exists, so adapters can live in it."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hook import Hook


def _alloc_memory_pool(result: Any, self: Any, memory_pool_config: Any = None) -> None:
    manager = self.lora_manager
    if manager is None or not manager.unified:
        return
    pool = self.token_to_kv_pool
    if type(pool) is not MHATokenToKVPool or pool.store_dtype != self.dtype:
        raise ValueError(
            f"--adapter-memory unified needs a plain KV cache in the model's {self.dtype}; this model has "
            f"{type(pool).__name__} in {pool.store_dtype}. Use --adapter-memory static."
        )
    manager.bind_kv_pool(pool.k_buffer, pool.v_buffer, self.max_total_num_tokens)


HOOKS = (
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.alloc_memory_pool",
        _alloc_memory_pool,
        HookType.AFTER,
        "The LoRA manager is made before the KV pool. Goes when upstream tells it that the pool exists.",
    ),
)
