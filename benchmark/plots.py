"""The plots of docs/benchmarks.md: ours in colour, all others in grey; SVG, the same bytes from the same figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmark.sections import Brief, Column, Variants, ratio

BAR_INCHES, PANEL_INCHES, NAMES_INCHES = 0.42, 3.4, 2.0
OURS, OTHERS, INK = "#1f6feb", "#b3bac5", "#24292f"


def plot(name: str, brief: Brief, variants: Variants, folder: Path) -> None:
    """``name``.svg: a panel for each plotted column, a bar for each row, its rounds as dots."""
    size = (PANEL_INCHES * len(brief.plotted) + NAMES_INCHES, BAR_INCHES * len(variants) + 0.9)
    with drawing(folder / f"{name}.svg", size) as figure:
        panels = figure.subplots(1, len(brief.plotted), sharey=True, squeeze=False)[0]
        for panel, column in zip(panels, brief.plotted, strict=True):
            _bars(panel, column, brief, variants)
        panels[0].set_yticks(range(len(variants)), list(variants), fontsize=9, color=INK)
        panels[0].invert_yaxis()


def _bars(panel: Axes, column: Column, brief: Brief, variants: Variants) -> None:
    """Bars with their median and how many times ours that is, round by round."""
    ours = variants[brief.ours[0]][column.figure]
    longest = max(max(figures[column.figure]) for figures in variants.values()) * column.scale
    for i, (name, figures) in enumerate(variants.items()):
        values = [value * column.scale for value in figures[column.figure]]
        median = statistics.median(values)
        panel.barh(i, median, height=0.7, color=OURS if name in brief.ours else OTHERS)
        panel.plot(values, [i] * len(values), ".", color=INK, markersize=3, alpha=0.5)
        times = "" if name in brief.ours else f"   {ratio(figures[column.figure], ours):.2f} x ours"
        label = f"{median:.{column.digits}f}{times}"
        panel.text(max(values) + 0.02 * longest, i, label, va="center", fontsize=8, color=INK)
    panel.set_xlim(0, longest * 1.4)
    panel.set_xlabel(f"{column.header} (lower is better)", fontsize=9, color=INK)
    panel.tick_params(labelsize=8, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of ``size`` inches that is saved to ``path`` at the end, the same bytes from the same drawing."""
    figure = plt.figure(figsize=size, layout="constrained")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
