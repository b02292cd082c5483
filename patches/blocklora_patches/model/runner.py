"""Refuses what cannot be served before a weight is read, and hands out the KV pool (``model_runner.py``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_lora, get_parallel
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.apply import check
from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.model.cpu_sum import share_memory
from blocklora_patches.model.unsupported import against_unified, refuse_unsupported

logger = logging.getLogger(__name__)


def _load_model(self: Any) -> None:
    check()  # every plugin has run by now
    if get_lora().enable_lora and not self.is_draft_worker:  # adapters are the target model's
        settings = settled(Settings.required(), self.model_config)
        refuse_other_settings(get_parallel().tp_group.all_gather_object(msgspec.to_builtins(settings)))
        settings.keep()
        share_memory(get_parallel().tp_group)


def settled(settings: Settings, model_config: Any) -> Settings:
    """``settings`` with the memory that adapters get, where the choice was left to us; TP rank 0 warns of ``static``.

    ``ValueError`` where something is on that is not supported.
    """
    refuse_unsupported(model_config, settings)
    if settings.adapter_memory != "auto":
        return settings
    reasons = against_unified(model_config)
    if reasons and get_parallel().tp_rank == 0:
        logger.warning(
            "adapters live in an arena of their own, %d MiB on each TP rank, because the KV cache's slots cannot hold "
            "them with %s. For another size start with --adapter-memory static --adapter-memory-mb MIB.",
            settings.adapter_memory_mb,
            ", ".join(reasons),
        )
    return msgspec.structs.replace(settings, adapter_memory="static" if reasons else "unified")


def refuse_other_settings(settings_of_ranks: Sequence[Mapping[str, Any]]) -> None:
    """``ValueError`` naming what differs between TP ranks, which must decide alike; each node has a launcher.

    Where the decision log is may differ.
    """
    first = settings_of_ranks[0]
    for rank, other in enumerate(settings_of_ranks):
        wrong = [name for name in first if name != "decision_log" and other[name] != first[name]]
        if wrong:
            told = ", ".join(f"{name} {other[name]!r} (rank 0: {first[name]!r})" for name in wrong)
            raise ValueError(
                f"TP rank {rank} was started with other settings of sglang-blocklora than rank 0: {told}. Give every "
                "node's launcher the same flags."
            )


def _alloc_memory_pool(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    manager = self.lora_manager
    if manager is None or not manager.unified:
        return
    pool = self.token_to_kv_pool
    # What refuse_unsupported could not foresee, such as a checkpoint that asks for a quantised KV cache.
    if type(pool) is not MHATokenToKVPool or pool.store_dtype != self.dtype:
        raise ValueError(
            f"--adapter-memory unified does not support this model's KV cache ({type(pool).__name__} in "
            f"{pool.store_dtype}; it needs a plain one in {self.dtype}). Use --adapter-memory static."
        )
    manager.bind_kv_pool(pool.k_buffer, pool.v_buffer, self.max_total_num_tokens)


_MODEL_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
HOOKS = (
    Hook(
        f"{_MODEL_RUNNER}.load_model",
        _load_model,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="Everything about plugins, flags and model is known, and no weight has been read yet: unsupported modes "
        "are refused here.",
        retire_when="upstream has a check that plugins can extend",
    ),
    Hook(
        f"{_MODEL_RUNNER}.alloc_memory_pool",
        _alloc_memory_pool,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="The LoRA manager is made before the KV pool.",
        retire_when="upstream tells it that the pool exists",
    ),
)
