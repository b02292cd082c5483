"""Shows a run while it goes on, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Progress:
    """One variant: its mean reward at every step, and what was seen of it last."""

    name: str
    rewards: list[float] = field(default_factory=list)
    version: str = ""
    text: str = ""
    sample_s: float = 0.0
    train_s: float = 0.0
    update_s: float = 0.0


def spark(values: Sequence[float]) -> str:
    """``values`` as a line of bars, the lowest to the highest."""
    if not values:
        return ""
    low, span = min(values), max(values) - min(values)
    return "".join(BARS[int((value - low) / span * (len(BARS) - 1))] if span else BARS[0] for value in values)


def table(variants: Sequence[Progress], steps: int) -> Table:
    """All variants now."""
    shown = Table(title="policy gradient, one adapter each, one server", title_justify="left")
    for heading in ("variant", "step", "reward", "", "version", "sample", "train", "update"):
        shown.add_column(heading, no_wrap=True)
    shown.add_column("latest answer")
    for one in variants:
        rewards = f"{one.rewards[0]:.2f} → {one.rewards[-1]:.2f}" if one.rewards else ""
        times = [f"{seconds:.1f} s" for seconds in (one.sample_s, one.train_s)] + [f"{one.update_s * 1000:.0f} ms"]
        step = f"{len(one.rewards)}/{steps}"
        shown.add_row(one.name, step, rewards, spark(one.rewards), one.version[:8], *times, escape(one.text[:60]))
    return shown


def plot(variants: Sequence[Progress], path: Path) -> None:
    """Mean reward by step, a line for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for one in variants:
        axes.plot(range(len(one.rewards)), one.rewards, marker="o", markersize=3, label=one.name)
    axes.set_xlabel("update")
    axes.set_ylabel("mean reward of the samples")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
