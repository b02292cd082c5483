"""Gives each matrix of a layer its place in an adapter's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blocklora_kernels.descriptor import Address

# Matrices start on multiples of 8 elements: 16 bytes of bf16, the widest load of a GPU thread.
ALIGNMENT_ELEMENTS = 8


class LayerLayout(NamedTuple):
    """Places in one layer: matrix i starts at ``addresses[i]``; the layer needs ``rows`` arena rows (slots)."""

    addresses: tuple[Address, ...]
    rows: int


def place(sizes: Sequence[int], row_width: int) -> LayerLayout:
    """Place matrices of ``sizes`` elements in two planes of rows of ``row_width`` elements.

    Largest first, each into the emptier plane (Graham's LPT rule), so both planes fill evenly; a matrix is one run.
    Sizes of 0 take nothing. Ties go to the K plane and to the lower index, so every TP rank decides alike.
    """
    used = [0, 0]
    addresses = [Address(0, 0, 0)] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if sizes[index] == 0:
            continue
        plane = 0 if used[0] <= used[1] else 1
        addresses[index] = Address(plane, used[plane] // row_width, used[plane] % row_width)
        used[plane] += -(-sizes[index] // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
    return LayerLayout(tuple(addresses), -(-max(used) // row_width))
