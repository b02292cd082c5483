"""What SGLang 0.5.23 does in another way than 0.5.22; ``current.py`` says what each name is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchResult
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from blocklora_patches.releases import v0_5_22
from blocklora_patches.releases.v0_5_22 import FUSED_LINEARS as FUSED_LINEARS
from blocklora_patches.releases.v0_5_22 import behind_weights as behind_weights
from blocklora_patches.releases.v0_5_22 import matched_tokens as matched_tokens
from blocklora_patches.releases.v0_5_22 import tp_rank_of as tp_rank_of
from blocklora_patches.releases.v0_5_22 import uses_dp_attention as uses_dp_attention

_MATCH = "sglang.srt.mem_cache.base_prefix_cache.MatchResult"
ATTRIBUTES = v0_5_22.ATTRIBUTES | {
    _MATCH: (*v0_5_22.ATTRIBUTES[_MATCH], "full_device_match_len"),
    "sglang.srt.server_args.ServerArgs": ("enable_amd_monokernel", "enable_nvidia_megakernel"),
}


class _LoRABackend:
    """What upstream's graph runner asks of the manager's backend, which is not there."""

    skip_inactive_dense_lora = True  # graphs without adapters beside those with: what model/graphs.py asks for, too


class ManagerBase(v0_5_22.ManagerBase):
    """As in 0.5.22, and what only 0.5.23 calls."""

    lora_backend = _LoRABackend()

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        self.init_graphs(max_bs_in_cuda_graph * num_tokens_per_req)

    def reset_routing_cache(self) -> None:
        """MoE layers are not adapted."""


class CacheBase(v0_5_22.CacheBase):
    """As in 0.5.22, but for one more argument."""

    def evict_for_alloc(
        self, params: EvictParams, *, allocation_reclaim_satisfied: Callable[[], bool] | None = None
    ) -> EvictResult:
        evict = partial(
            UnifiedRadixCache.evict_for_alloc, self, allocation_reclaim_satisfied=allocation_reclaim_satisfied
        )
        return self.evict_by_strategy(evict, params)


def without_weights(result: MatchResult, weights: int) -> MatchResult:
    """A match of an adapter's ``weights`` slots and what is behind them, told as a match of the latter."""
    length = result.full_device_match_len
    rest = v0_5_22.without_weights(result, weights)
    return rest._replace(full_device_match_len=None if length is None else max(length - weights, 0))


def unsupported(execution: Any) -> tuple[tuple[str, bool, str], ...]:
    """Rows for the table of ``model/unsupported.py``."""
    kernel, why = execution.kernel, "its kernels compute whole steps, past the linears that adapters join"
    return (
        ("--enable-nvidia-megakernel", kernel.enable_nvidia_megakernel, why),
        ("--enable-amd-monokernel", kernel.enable_amd_monokernel, why),
    )
