"""Counts requests per adapter as their tokens come back (``managers/tokenizer_manager.py``)."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


@functools.cache
def label_budget() -> Any:
    """The process's one ``LabelBudget``. prometheus_client is imported here, once its folder is set."""
    from sglang_blocklora.reporting.prometheus import LabelBudget

    return LabelBudget()


@functools.cache
def _metrics() -> Any:
    from sglang_blocklora.reporting.prometheus import RequestMetrics

    return RequestMetrics(label_budget())


def _collect_metrics(self: Any, state: Any, recv_obj: Any, i: int) -> None:
    adapter = state.obj.lora_path
    if not state.ttft_observed and self.disaggregation_mode != DisaggregationMode.PREFILL:
        _metrics().first_token(adapter, state.time_stats.get_first_token_latency())
    if state.finished:
        generated = recv_obj.completion_tokens[i] if getattr(recv_obj, "completion_tokens", None) else 0
        _metrics().finished(adapter, recv_obj.prompt_tokens[i], recv_obj.cached_tokens[i], generated)


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.collect_metrics",
        _collect_metrics,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Upstream's series do not tell adapters apart.",
        retire_when="upstream labels its series with the adapter",
    ),
)
