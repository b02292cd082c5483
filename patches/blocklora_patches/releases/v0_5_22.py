"""What SGLang 0.5.22 does in another way than 0.5.21; ``current.py`` says what each name is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from blocklora_patches.releases import v0_5_21

FUSED_LINEARS: tuple[str, ...] = ("sglang.srt.layers.dual_gemm.DualGemm.can_run",)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sglang.srt.layers.linear.ColumnParallelLinear": ("tp_group",),
    "sglang.srt.mem_cache.base_prefix_cache.MatchResult": ("device_prefix_len",),
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.TreePathNodeInfo": ("node_id",),
    "sglang.srt.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface": (
        "collect_full_device_indices",
        "collect_path_info",
    ),
    "sglang.srt.runtime_context.ParallelContext": ("attn_dp_enabled",),
}


class ManagerBase(v0_5_21.ManagerBase):
    """As in 0.5.21, which has arguments more, and another name."""

    attn_dp_enabled = False


class CacheBase(UnifiedRadixCache):
    """How this release calls ``AdapterPrefixCache``, whose own the methods declared here are.

    Slots of a match are no longer in its result: upstream collects them from the tree's path, on which an adapter's
    weights come first.
    """

    evict_by_strategy: Callable[[Callable[[EvictParams], EvictResult], EvictParams], EvictResult]
    match_behind: Callable[[Callable[[MatchPrefixParams], MatchResult], MatchPrefixParams], MatchResult]
    holds_weights: Callable[[int], bool]
    tree_key: Callable[[RadixKey], RadixKey]

    def _match_tree(self, params: MatchPrefixParams) -> MatchResult:
        """The part of a match that upstream also calls by itself, when it has inserted what a request computed."""
        return self.match_behind(super()._match_tree, params)

    def evict_for_alloc(self, params: EvictParams) -> EvictResult:
        return self.evict_by_strategy(super().evict_for_alloc, params)

    def touch_prefix(self, key: RadixKey) -> None:
        super().touch_prefix(self.tree_key(key))

    def path_device_indices(self, node: int) -> torch.Tensor:
        """Slots of the KV on the path to ``node``, without the weights that the path may begin with."""
        (path,) = self.tree_core.collect_path_info([node])
        if path and self.holds_weights(path[0].node_id):
            return self.tree_core.collect_full_device_indices(node, path[0].node_id)
        return super().path_device_indices(node)

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of what a request was matched with: as in every other cache, from the path that is told above."""
        return BasePrefixCache.prefix_device_indices(self, req)


def matched_tokens(result: MatchResult) -> int:
    """How many tokens a match found in the device's memory."""
    return int(result.device_prefix_len)


def without_weights(result: MatchResult, weights: int) -> MatchResult:
    """A match of an adapter's ``weights`` slots and what is behind them, told as a match of the latter."""
    return result._replace(
        device_prefix_len=result.device_prefix_len - weights,
        full_kv_hit_length=max(result.full_kv_hit_length - weights, 0),
    )


def behind_weights(params: InsertParams, weights: int) -> InsertParams:
    """``params`` of an insert whose key is longer by ``weights`` at its beginning.

    What a request has not inserted before counts as a hit: the weights too, with its first insert.
    """
    return dataclasses.replace(
        params,
        prev_prefix_len=weights + params.prev_prefix_len,
        inserted_len=params.inserted_len and weights + params.inserted_len,
    )


def tp_rank_of(linear: Any) -> int:
    """The TP rank whose part of the weights ``linear`` holds."""
    return int(get_group_rank_size(linear.tp_group)[0])


def uses_dp_attention(parallel: Any) -> bool:
    """Whether tokens of one batch differ between TP ranks."""
    return bool(parallel.attn_dp_enabled)


def unsupported(execution: Any) -> tuple[tuple[str, bool, str], ...]:
    """Rows for the table of ``model/unsupported.py``."""
    return ()
