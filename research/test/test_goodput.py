"""Goodput of records made by hand, and what is said over all workloads."""

from __future__ import annotations

import pytest

from research.goodput import ASKED, overall, scenario
from research.simulation.figures import figures
from research.simulation.outcome import Outcome, Record


def answered(ttft_s: float, tpot_s: float, tokens: int = 11) -> Record:
    """A request that came at 1 s."""
    first = 1 + ttft_s
    return Record(0, 1.0, 64, tokens, True, 1.0, 0, first, first + (tokens - 1) * tpot_s)


def test_a_request_counts_that_keeps_both_limits() -> None:
    records = [answered(0.4, 0.02), answered(0.4, 0.05), answered(1.9, 0.02), answered(2.1, 0.02), answered(0.4, 0.2)]
    found = figures(Outcome(records))
    assert found["goodput_share"] == pytest.approx(3 / 5)
    assert found["goodput_interactive_share"] == pytest.approx(1 / 5)


def test_an_answer_of_one_token_has_no_time_between_tokens() -> None:
    assert answered(0.4, 9.0, tokens=1).tpot_s == 0


def test_the_best_of_each_workload_is_what_an_order_is_compared_with() -> None:
    def row(goodput: float, p99: float) -> dict[str, list[float]]:
        shares = {"goodput_share": [goodput], "goodput_interactive_share": [0.5]}
        return shares | {"ttft_p99_ms": [p99], "worst_adapter_ttft_p99_ms": [2 * p99]}

    found = {
        "one": {"fcfs": row(0.5, 100.0), "lpm": row(0.5, 800.0), "other": row(1.0, 400.0)},
        "two": {"fcfs": row(0.80, 100.0), "lpm": row(0.80, 40.0), "other": row(0.78, 50.0)},
    }
    rows = overall(found)["all workloads"]
    assert rows["fcfs"]["goodput_share_close"] == [0.5]
    assert rows["fcfs"]["goodput_share_least"] == [0.5]
    assert rows["other"]["goodput_share_close"] == [1.0]
    assert rows["other"]["goodput_share_least"] == [pytest.approx(0.975)]
    assert rows["other"]["worst_over_fcfs"] == [4.0]
    assert rows["other"]["adapter_over_lpm"] == [1.25]
    assert rows["other"]["mean_goodput_share"] == [0.89]
    assert rows["other"]["mean_ttft_p99_ms"] == [225.0]
    assert rows["other"]["goodput_interactive_share_close"] == [1.0]


def test_the_two_loads_of_a_workload_ask_the_same_adapters() -> None:
    for asked in ASKED:
        near, beyond = (scenario(asked, rate).workload for rate in (asked.near, asked.beyond))
        assert (near.adapters, near.popularity, near.system_tokens) == (asked.adapters, asked.popularity, 512)
        assert near.sessions < beyond.sessions
