"""Refuses, in one message at start-up, modes and models with which adapters cannot be served yet."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state
from sglang.srt.runtime_context import (
    get_device,
    get_disagg,
    get_exec,
    get_lora,
    get_memory,
    get_model,
    get_parallel,
    get_schedule,
    get_serving,
    get_spec,
)
from sglang_blocklora.settings import Settings
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS

from blocklora_patches.releases.current import release

BACKEND_NAME = "blocklora"  # of --radix-cache-backend: the cache in which adapters are prefixes

TOKEN_PAIRS = ("EAGLE", "EAGLE3")  # algorithms with a radix tree of their own
Table = tuple[tuple[str, bool, str], ...]  # what, whether it is on, why it is not supported


def refuse_unsupported(model_config: Any, settings: Settings) -> None:
    """``ValueError`` naming everything that is on and not supported, and the ways out.

    model_config  SGLang's, of the base model; nothing needs to be loaded yet
    settings      what our launcher was asked for
    """
    wrong = [
        _sentence(
            "sglang-blocklora",
            _on(_everywhere(model_config, settings)),
            "Drop it, or start stock SGLang (python -m sglang.launch_server)",
        )
    ]
    if settings.adapter_memory == "unified":
        wrong.append(
            _sentence("--adapter-memory unified", against_unified(model_config), "Use --adapter-memory static")
        )
    elif settings.adapter_memory == "static":
        own = get_memory().radix_cache_backend == BACKEND_NAME
        table = (("--radix-cache-backend blocklora", own, "it is the cache of --adapter-memory unified"),)
        wrong.append(_sentence("--adapter-memory static", _on(table), "Drop it"))
    if any(wrong):
        raise ValueError(" ".join(filter(None, wrong)))


def against_unified(model_config: Any) -> list[str]:
    """What is on that keeps adapters out of the KV cache's slots, each with the reason; alike on all TP ranks."""
    return _on(_unified(model_config))


def _everywhere(model_config: Any, settings: Settings) -> Table:
    parallel, execution = get_parallel(), get_exec()
    drafts = get_spec().speculative_algorithm
    part_of_batch = "a forward would see only some of the tokens that were grouped by adapter"
    return (
        ("--pp-size", parallel.pp_size > 1, "a TP rank would hold only some layers of an adapter"),
        ("--enable-dp-attention", release.uses_dp_attention(parallel), "tokens of one batch differ between ranks"),
        ("--attn-cp-size", parallel.attn_cp_size > 1, part_of_batch),
        ("--dcp-size", parallel.attn_dcp_size > 1, part_of_batch),
        ("--enable-layernorm-sp", parallel.enable_layernorm_sp, part_of_batch),
        ("--enable-two-batch-overlap", execution.overlap.enable_two_batch_overlap, part_of_batch),
        ("--enable-pdmux", get_disagg().enable_pdmux, "two batches would run at once"),
        ("--enable-torch-compile", execution.graph.enable_torch_compile, "the compiled code would keep one batch"),
        (
            "--enable-deterministic-inference with adapters computed in torch",
            execution.deterministic.enable_deterministic_inference
            and not settings.uses_triton(get_device().device == "cuda"),
            "its products of few rows and of many differ in their last bits",
        ),
        ("--enable-lora-overlap-loading", bool(get_lora().enable_lora_overlap_loading), "it drives SGLang's slot pool"),
        (
            f"--speculative-algorithm {drafts}",
            drafts not in (None, "NGRAM", *TOKEN_PAIRS),
            "adapters join the verification of drafts of NGRAM, EAGLE and EAGLE3",
        ),
        *release.unsupported(execution),
    )


def _unified(model_config: Any) -> Table:
    memory, kv_dtype = get_memory(), get_model().kv_cache_dtype
    own = ("auto", "bf16", "bfloat16") if model_config.dtype == torch.bfloat16 else ("auto",)
    latent = model_config.attention_arch == AttentionArch.MLA
    row = model_config.get_num_kv_heads(get_parallel().tp_size) * model_config.head_dim
    other_cache, elsewhere = "adapters live in a radix cache of their own", "KV would be moved without its adapter"
    split, drafts = "its KV pool is split", get_spec().speculative_algorithm
    return (
        ("multi-head latent attention (MLA)", latent, "a slot of its KV cache is one row, not K and V"),
        ("sliding-window layers with a KV pool of their own", model_config.is_hybrid_swa, split),
        ("state-space (Mamba) or linear-attention layers", uses_ssm_state(model_config), split),
        (
            f"a K row of {row} elements",
            row % ALIGNMENT_ELEMENTS != 0 and not latent,
            f"KV heads of a TP rank times head dimension must be a multiple of {ALIGNMENT_ELEMENTS}",
        ),
        (
            "V rows of another width than K's",
            model_config.v_head_dim != model_config.head_dim and not latent,
            "rows must be alike",
        ),
        (f"--kv-cache-dtype {kv_dtype}", kv_dtype not in own, "adapters are kept in the model's own data type"),
        (
            f"--speculative-algorithm {drafts}",
            drafts in TOKEN_PAIRS,
            "its radix tree has keys of pairs of tokens, in which an adapter can be no prefix",
        ),
        ("--prefill-only-disable-kv-cache", get_schedule().prefill_only_disable_kv_cache, "there are no slots"),
        (
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
            envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
            "the KV pool would change its size under the rows of adapters",
        ),
        ("--enable-page-major-kv-layout", memory.enable_page_major_kv_layout, "a layer's rows are not adjacent"),
        ("--disable-radix-cache", memory.disable_radix_cache, "adapters live in the radix tree"),
        (
            f"--radix-cache-backend {memory.radix_cache_backend}",
            memory.radix_cache_backend != BACKEND_NAME,
            other_cache,
        ),
        ("--enable-lmcache", memory.enable_lmcache, other_cache),
        ("--enable-flexkv", memory.enable_flexkv, other_cache),
        ("--enable-hierarchical-cache", memory.enable_hierarchical_cache, elsewhere),
        ("--enable-unified-cache-external-linker", memory.enable_unified_cache_external_linker, elsewhere),
        ("--disaggregation-mode", get_disagg().disaggregation_mode != "null", elsewhere),
        ("--enable-session-radix-cache", memory.enable_session_radix_cache, "sessions do not know adapters' prefixes"),
        ("--enable-streaming-session", get_serving().enable_streaming_session, "sessions keep KV outside the tree"),
    )


def _on(table: Table) -> list[str]:
    return [f"{what} ({why})" for what, on, why in table if on]


def _sentence(who: str, wrong: list[str], advice: str) -> str:
    return f"{who} does not support {', '.join(wrong)}. {advice}." if wrong else ""
