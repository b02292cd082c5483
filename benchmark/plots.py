"""The plots of docs/benchmarks.md: one picture for each part, as PNG and SVG, the same bytes from the same figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from benchmark.record import Run
    from benchmark.report import Section

BAR_INCHES, PANEL_INCHES = 0.34, 3.6
BASELINE_COLOUR, COLOUR = "#9aa5b1", "#2b6cb0"


def plot(section: Section, run: Run, folder: Path) -> None:
    """A panel for each scenario: bars of the section's first column, medians, with the rounds as dots."""
    column, scenarios = section.columns[0], run.figures
    names = list(next(iter(scenarios.values())))
    size = (PANEL_INCHES * len(scenarios) + 1.5, BAR_INCHES * len(names) + 1.0)
    figure, panels = plt.subplots(1, len(scenarios), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, (scenario, variants) in zip(panels[0], scenarios.items(), strict=True):
        for i, name in enumerate(names):
            values = [value * column.scale for value in variants.get(name, {}).get(column.figure, [])]
            if values:
                panel.barh(i, statistics.median(values), color=BASELINE_COLOUR if name == section.baseline else COLOUR)
                panel.plot(values, [i] * len(values), "k.", markersize=3, alpha=0.6)
        panel.set_title(scenario, fontsize=9)
        panel.set_xlabel(column.header, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0][0].invert_yaxis()
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": section.part}):
        figure.savefig(folder / f"{section.part}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{section.part}.png", dpi=150, metadata={"Software": None})
    plt.close(figure)
