"""The picture of README.md: two GPUs, each with its own blocks of an adapter, and nothing sent for LoRA.

python -m benchmark.picture
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from benchmark.plots import INK, drawing
from benchmark.record import REPOSITORY

COLOURS = ("#1f6feb", "#d9730d")
BASE, ZERO, FRAME, QUIET = "#d0d7de", "#ffffff", "#57606a", "#6e7781"
WIDE, RANK = 10.0, 5.0  # a linear's width, and LoRA rank r; blocks are half of each
UPPER, LOWER = 27.0, 12.5  # where column-parallel and row-parallel linears are drawn


def draw(folder: Path) -> None:
    """Write ``two_gpus.svg``: an adapter of two blocks, and which part of it each of two TP ranks holds."""
    with drawing(folder / "two_gpus.svg", (10.4, 4.4)) as figure:
        axes = figure.add_subplot()
        axes.set(xlim=(-1, 109), ylim=(0, 45.5), aspect="equal")
        axes.axis("off")
        _adapter(axes, 0)
        _arrow(axes, (33.5, 25.7), (39.5, 25.7))
        _gpu(axes, 40, 0)
        _gpu(axes, 76, 1)
        _rectangle(axes, 40, 1, 68, 4.2, BASE)
        _text(axes, 74, 3.1, "the base model's own all-reduce, as without LoRA;  LoRA sends nothing", 9.5)


def _adapter(axes: Axes, left: float) -> None:
    """Both kinds of linears, B (out x r) and A (r x in), in the colours of the ranks that hold their parts."""
    _box(axes, left, 6.5, 33, 38.5, "one adapter", "block-diagonal LoRA of PEFT, 2 blocks")
    _text(axes, left + 6.5, UPPER + 5, "q k v\ngate up", 9.5)
    _diagonal(axes, left + 13, UPPER, RANK, WIDE)
    for block, bottom in enumerate((UPPER + 5, UPPER + 2.5)):
        _rectangle(axes, left + 20.5, bottom, WIDE, RANK / 2, COLOURS[block])
    _text(axes, left + 6.5, LOWER + 5, "o\ndown", 9.5)
    for block in (0, 1):
        _rectangle(axes, left + 13 + block * RANK / 2, LOWER, RANK / 2, WIDE, COLOURS[block])
    _diagonal(axes, left + 20.5, LOWER + 2.5, WIDE, RANK)
    _text(axes, left + 15.5, 9.6, "B", 10, style="italic")
    _text(axes, left + 25.5, 9.6, "A", 10, style="italic")


def _gpu(axes: Axes, left: float, rank: int) -> None:
    """What TP rank ``rank`` holds: its share of the base model's linears, and its blocks of their factors."""
    colour = COLOURS[rank]
    _box(axes, left, 6.5, 32, 38.5, f"GPU {rank}", "its part of the base model + its blocks")
    middle = UPPER + 5
    _rectangle(axes, left + 3, middle - WIDE / 4, WIDE, WIDE / 2, BASE, "W")
    _text(axes, left + 15, middle, "+", 12)
    _rectangle(axes, left + 17, middle - WIDE / 4, RANK / 2, WIDE / 2, colour)
    _rectangle(axes, left + 20, middle - RANK / 4, WIDE, RANK / 2, colour)
    middle = LOWER + 5
    _rectangle(axes, left + 5.5, middle - WIDE / 2, WIDE / 2, WIDE, BASE, "W")
    _text(axes, left + 15, middle, "+", 12)
    _rectangle(axes, left + 17, middle - WIDE / 2, RANK / 2, WIDE, colour)
    _rectangle(axes, left + 20, middle - RANK / 4, WIDE / 2, RANK / 2, colour)
    _text(axes, left + 8, 9.6, "base", 9, color=QUIET)
    _text(axes, left + 18.2, 9.6, "B", 10, style="italic")
    _text(axes, left + 22.5, 9.6, "A", 10, style="italic")


def _diagonal(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """A factor whose blocks stand on its diagonal; the rest is zero and is stored nowhere."""
    _rectangle(axes, x, y, width, height, ZERO)
    _rectangle(axes, x, y + height / 2, width / 2, height / 2, COLOURS[0])
    _rectangle(axes, x + width / 2, y, width / 2, height / 2, COLOURS[1])
    for across, up in ((0.75, 0.75), (0.25, 0.25)):
        _text(axes, x + across * width, y + up * height, "0", 8, color=QUIET)


def _box(axes: Axes, x: float, y: float, width: float, height: float, title: str, under: str) -> None:
    style = "round,pad=0,rounding_size=1.2"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor="#f6f8fa", edgecolor=FRAME))
    _text(axes, x + width / 2, y + height - 2.4, title, 12, weight="bold")
    _text(axes, x + width / 2, y + height - 5.4, under, 8.5, color=QUIET)


def _rectangle(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str | None = None
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=FRAME, linewidth=0.8))
    if text:
        _text(axes, x + width / 2, y + height / 2, text, 10, style="italic")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": FRAME, "lw": 1.5})


def _text(axes: Axes, x: float, y: float, text: str, size: float, **options: str) -> None:
    axes.text(x, y, text, fontsize=size, ha="center", va="center", **{"color": INK} | options)


if __name__ == "__main__":
    draw(REPOSITORY / "docs/images")
