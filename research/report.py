"""Writes the tables of the simulators and of the cost model from their raw results. Simulates nothing.

python -m research.report
"""

from __future__ import annotations

from benchmark.report import write
from research.sections import SECTIONS

DOCUMENTS = ("research/RESULTS.md", "docs/memory.md", "docs/scheduler.md")

if __name__ == "__main__":
    write(DOCUMENTS, SECTIONS)
