"""Modes of SGLang that adapters cannot be served with yet: one table, one message at start-up."""

from __future__ import annotations

from sglang.srt.mem_cache.registry import TreeCacheBuildContext
from sglang.srt.runtime_context import get_disagg, get_exec, get_lora, get_memory, get_parallel, get_spec


def refuse_unsupported() -> None:
    """``ValueError`` naming every flag that is on and not supported, and the way out."""
    parallel, execution = get_parallel(), get_exec()
    part_of_batch = "a forward would see only some of the tokens that were grouped by adapter"
    table = (
        ("--pp-size", parallel.pp_size > 1, "a TP rank would hold only some layers of an adapter"),
        ("--enable-dp-attention", parallel.enable_dp_attention, "tokens of one batch differ between ranks"),
        ("--attn-cp-size", parallel.attn_cp_size > 1, part_of_batch),
        ("--dcp-size", parallel.attn_dcp_size > 1, part_of_batch),
        ("--enable-layernorm-sp", parallel.enable_layernorm_sp, part_of_batch),
        ("--enable-two-batch-overlap", execution.overlap.enable_two_batch_overlap, part_of_batch),
        ("--enable-pdmux", get_disagg().enable_pdmux, "two batches would run at once"),
        ("--enable-torch-compile", execution.graph.enable_torch_compile, "the compiled code would keep one batch"),
        ("--enable-lora-overlap-loading", bool(get_lora().enable_lora_overlap_loading), "it drives SGLang's slot pool"),
        (
            "--speculative-algorithm",
            get_spec().speculative_algorithm is not None,
            "verification batches are not grouped by adapter yet",
        ),
    )
    _refuse(table, "sglang-blocklora", "Drop these flags, or start stock SGLang (python -m sglang.launch_server).")


def refuse_unified_with(context: TreeCacheBuildContext) -> None:
    """``ValueError`` naming everything that ``--adapter-memory unified`` cannot work with, and the way out."""
    memory = get_memory()
    table = (
        ("--enable-hierarchical-cache", context.enable_hierarchical_cache, "adapters would be copied as KV"),
        ("--disable-radix-cache", context.disable_radix_cache, "adapters live in the radix tree"),
        ("--enable-session-radix-cache", memory.enable_session_radix_cache, "sessions do not know adapters' prefixes"),
        ("--kv-events-config", context.params.enable_kv_cache_events, "subscribers would see pseudo tokens"),
        ("a time to live of the cache", context.params.cache_ttl_seconds is not None, "it would drop adapters"),
        (
            "--disaggregation-mode",
            get_disagg().disaggregation_mode != "null",
            "the other side lacks the adapters' slots",
        ),
        ("sliding-window attention", context.is_hybrid_swa, "its KV pool is split"),
        ("state-space layers", context.is_hybrid_ssm, "its KV pool is split"),
    )
    _refuse(table, "--adapter-memory unified", "Use --adapter-memory static.")


def _refuse(table: tuple[tuple[str, bool, str], ...], what: str, advice: str) -> None:
    wrong = [f"{flag} ({why})" for flag, on, why in table if on]
    if wrong:
        raise ValueError(f"{what} does not support {', '.join(wrong)}. {advice}")
