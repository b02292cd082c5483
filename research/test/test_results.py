"""The documents of the simulators are what their raw results give, and every experiment runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmark.record import REPOSITORY
from benchmark.report import render
from research.report import DOCUMENTS
from research.sections import SECTIONS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_are_what_the_raw_results_give(document):
    """``python -m research.report`` mends it."""
    text = (REPOSITORY / document).read_text()
    assert render(document, text, SECTIONS) == text


def test_every_section_is_beside_its_raw_results():
    text = (REPOSITORY / "research/RESULTS.md").read_text()
    assert [section.part for section in SECTIONS if f"<!-- begin {section.part} -->" not in text] == []


@pytest.mark.parametrize(
    "experiment",
    [
        "predict --quick",
        "activated --quick",
        "policy_time --repeat 1",
        "memory --help",
        "scheduler --help",
        "goodput --help",
        "calibrate --help",
    ],
)
def test_experiments_run(experiment):
    """Those that take longer only as far as their command line, which imports all they need."""
    subprocess.run([sys.executable, "-m", *f"research.{experiment}".split()], cwd=REPOSITORY, check=True, timeout=300)
