"""The soak of ``make soak`` with smaller numbers: everything at once, every answer compared with PEFT's tokens."""

from __future__ import annotations

from pathlib import Path

from blocklora_testing.soak.soak import SMALL, soak


def test_a_small_soak(tmp_path: Path) -> None:
    result = soak(tmp_path, SMALL, seed=1)
    assert result.tally.problems == []
    assert [f"{check.name}: {check.found}" for check in result.checks if not check.held] == []
    right = {kind for kind, row in result.tally.rows.items() if row.right}
    assert {"generate", "load", "flush, idle", "pause: in_place", "slots, idle", "sweep"} <= right
