"""Counts requests per adapter as their tokens come back."""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.disaggregation.utils import DisaggregationMode


@functools.cache
def label_budget() -> Any:
    """The process's one ``LabelBudget``. prometheus_client is imported here, once its folder is set."""
    from sglang_blocklora.reporting.prometheus import LabelBudget

    return LabelBudget()


@functools.cache
def _metrics() -> Any:
    from sglang_blocklora.reporting.prometheus import RequestMetrics

    return RequestMetrics(label_budget())


@functools.cache
def usage() -> Any:
    """The process's one ``UsageMetrics``."""
    from sglang_blocklora.reporting.usage import UsageMetrics

    return UsageMetrics(label_budget())


def count(tokenizer_manager: Any, state: Any, recv_obj: Any, i: int) -> None:
    """Count what came for request ``i`` of ``recv_obj``, whose ``ReqState`` is ``state``."""
    adapter = state.obj.lora_path
    if not state.ttft_observed and tokenizer_manager.disaggregation_mode != DisaggregationMode.PREFILL:
        _metrics().first_token(adapter, state.time_stats.get_first_token_latency())
    if state.finished:
        generated = recv_obj.completion_tokens[i] if getattr(recv_obj, "completion_tokens", None) else 0
        _metrics().finished(adapter, recv_obj.prompt_tokens[i], recv_obj.cached_tokens[i], generated)
