"""Findings of the doctor, by what they are about."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_blocklora.doctor.finding import Finding


def told(findings: Iterable[Finding]) -> dict[str, Finding]:
    """``findings`` by what they are about; of a fault alone it is told what to do, or ``AssertionError``."""
    by_what = {finding.what: finding for finding in findings}
    assert all((finding.result == "fault") == bool(finding.advice) for finding in by_what.values())
    return by_what
