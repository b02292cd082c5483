"""A slice of ``make fuzz`` against a live server."""

from __future__ import annotations

from pathlib import Path

from blocklora_testing.fuzz.live import fuzz_server


def test_random_requests_harm_nobody(tmp_path: Path) -> None:
    rows, statuses, checks = fuzz_server(tmp_path, 240, seed=1)
    assert [failure for row in rows.values() for failure in row.failures] == []
    assert [f"{check.name}: {check.found}" for check in checks if not check.held] == []
    assert statuses["as it should be"][200] > 0
    assert statuses["loads"][200] > 0, "no path was accepted, so none that was refused tells anything"
