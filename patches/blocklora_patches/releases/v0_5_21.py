"""What SGLang 0.5.21 does in another way than later releases; ``current.py`` says what each name is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, Phase
from sglang.srt.utils import is_cuda

FUSED_LINEARS: tuple[str, ...] = ()
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sglang.srt.layers.linear.ColumnParallelLinear": ("tp_rank",),
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult": ("device_indices",),
    "sglang.srt.server_args.ServerArgs": ("enable_dp_attention",),
}


class ManagerBase(LoRAManager):
    """How this release calls ``BlockLoRAManager``, whose own ``start`` and ``init_graphs`` are."""

    enable_dp_attention = False

    def __init__(
        self,
        base_model: torch.nn.Module,
        base_hf_config: Any,
        max_loras_per_batch: int,
        load_config: Any,
        dtype: torch.dtype,
        server_args: Any,
        lora_backend: str = "triton",
        tp_size: int = 1,
        tp_rank: int = 0,
        max_lora_rank: int | None = None,
        target_modules: Iterable[str] | None = None,
        lora_paths: list[LoRARef] | None = None,
    ) -> None:
        self.start(base_model, base_hf_config, max_loras_per_batch, dtype, max_lora_rank, target_modules, lora_paths)

    def init_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        self.init_graphs(max_bs_in_cuda_graph * num_tokens_per_req)


class CacheBase(UnifiedRadixCache):
    """How this release calls ``AdapterPrefixCache``, whose own ``evict_by_strategy`` and ``match_behind`` are."""

    evict_by_strategy: Callable[[Callable[[EvictParams], EvictResult], EvictParams], EvictResult]
    match_behind: Callable[[Callable[[MatchPrefixParams], MatchResult], MatchPrefixParams], MatchResult]

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        return self.match_behind(super().match_prefix, params)

    def evict_for_alloc(self, params: EvictParams) -> EvictResult:
        return self.evict_by_strategy(super().evict_for_alloc, params)


def matched_tokens(result: MatchResult) -> int:
    """How many tokens a match found in the device's memory."""
    return len(result.device_indices)


def without_weights(result: MatchResult, weights: int) -> MatchResult:
    """A match of an adapter's ``weights`` slots and what is behind them, told as a match of the latter."""
    return result._replace(
        device_indices=result.device_indices[weights:],
        full_kv_hit_length=max(result.full_kv_hit_length - weights, 0),
    )


def behind_weights(params: InsertParams, weights: int) -> InsertParams:
    """``params`` of an insert whose key is longer by ``weights`` at its beginning."""
    return dataclasses.replace(params, prev_prefix_len=weights + params.prev_prefix_len)


def tp_rank_of(linear: Any) -> int:
    """The TP rank whose part of the weights ``linear`` holds."""
    return int(linear.tp_rank)


def uses_dp_attention(parallel: Any) -> bool:
    """Whether tokens of one batch differ between TP ranks."""
    return bool(parallel.enable_dp_attention)


def unsupported(execution: Any) -> tuple[tuple[str, bool, str], ...]:
    """Rows for the table of ``model/unsupported.py``."""
    graphs, why = execution.graph.cuda_graph_config or CudaGraphConfig(), "the compiled code would keep one batch"
    compiled = {phase: getattr(graphs, phase).backend == Backend.TC_PIECEWISE for phase in Phase.ALL}
    return (
        ("--cuda-graph-backend-decode tc_piecewise", compiled[Phase.DECODE], why),
        # Elsewhere it is the default, of graphs that are not captured.
        ("--cuda-graph-backend-prefill tc_piecewise", compiled[Phase.PREFILL] and is_cuda(), why),
    )
