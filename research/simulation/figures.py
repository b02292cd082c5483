"""What a simulated run says: figures of its requests and copies."""

from __future__ import annotations

import statistics
from collections import defaultdict

import numpy as np

from research.simulation.outcome import Outcome

SLO_TTFT_S = 6.0
SLO_RATIO = 5.0
# TTFT and TPOT in seconds: what MLPerf Inference asks of Llama-3.1-8B in its server scenario, and of an interactive one
# (``llama3_1-8b.Server`` and ``llama3_1-8b-interactive.Server`` in loadgen/mlperf.conf of mlcommons/inference).
SERVER_LIMITS = (2.0, 0.1)
INTERACTIVE_LIMITS = (0.5, 0.03)
FEWEST = 5  # requests of an adapter that make a P99 worth comparing


def figures(outcome: Outcome) -> dict[str, float]:
    """Simulated figures of one run by name; shares are in [0, 1].

    worst_adapter_ttft_p99_ms, median_adapter_ttft_p99_ms   the largest P99 TTFT of any adapter with at least ``FEWEST``
                               requests, and the one that half of them stay below
    slo_share, slo_ratio_share requests with a TTFT under 6 s; under 5 times that of an idle server with nothing cached
    goodput_share, goodput_interactive_share   requests within both limits of ``SERVER_LIMITS``, ``INTERACTIVE_LIMITS``
    adapter_hit_share          requests that found their adapter resident when they arrived; the others found it on the
                               host, which holds all adapters here
    prefix_hit_share           prompt tokens found in the cache
    invalid_kv_share           cached KV whose adapter was not resident, mean over the run
    """
    records = outcome.records
    ttft = np.array([record.ttft_s for record in records])
    by_adapter = defaultdict(list)
    for record in records:
        by_adapter[record.adapter].append(record.ttft_s)
    by_adapter_p99 = [float(np.percentile(times, 99)) for times in by_adapter.values() if len(times) >= FEWEST]
    lasted_s = max(record.end_s for record in records) - records[0].arrival_s
    return {
        "requests": len(records),
        "ttft_p50_ms": 1000 * float(np.percentile(ttft, 50)),
        "ttft_p99_ms": 1000 * float(np.percentile(ttft, 99)),
        "worst_adapter_ttft_p99_ms": 1000 * max(by_adapter_p99, default=0.0),
        "median_adapter_ttft_p99_ms": 1000 * statistics.median(by_adapter_p99 or [0.0]),
        "output_tokens_per_s": sum(record.new_tokens for record in records) / lasted_s,
        "slo_share": float((ttft < SLO_TTFT_S).mean()),
        "slo_ratio_share": float(np.mean([record.ttft_s < SLO_RATIO * record.alone_s for record in records])),
        "goodput_share": _within(outcome, *SERVER_LIMITS),
        "goodput_interactive_share": _within(outcome, *INTERACTIVE_LIMITS),
        "adapter_hit_share": float(np.mean([record.resident for record in records])),
        "prefix_hit_share": sum(r.cached_tokens for r in records) / sum(r.prompt_tokens for r in records),
        "invalid_kv_share": statistics.fmean(outcome.invalid_shares or [0.0]),
        "copied_gb": outcome.copied_bytes / 1e9,
        "loads": outcome.loads,
        "retractions": outcome.retractions,
    }


def _within(outcome: Outcome, ttft_s: float, tpot_s: float) -> float:
    """Share of requests that kept both limits."""
    return float(np.mean([record.ttft_s <= ttft_s and record.tpot_s <= tpot_s for record in outcome.records]))
