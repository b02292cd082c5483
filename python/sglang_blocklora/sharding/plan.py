"""Plans the matrices of one linear: which part of which checkpoint module, and in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor, SliceDescriptor

from sglang_blocklora.sharding.cut import ModuleShape, SliceCut, cut_slice
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import LinearSpec, ModelSpec

NOT_ADAPTED = SliceDescriptor(0, 0, Address(0, 0, 0), 0, Blocks(0, 0, 0))


@dataclass(frozen=True)
class SlicePart:
    """The checkpoint module that feeds a slice, and the TP rank's part of it."""

    module: str
    cut: SliceCut


@dataclass(frozen=True)
class LinearPlan:
    """Parts of one linear in slice order, None where the adapter leaves a slice alone.

    In memory the linear has one A, the slices' local A stacked in slice order, and one B per adapted slice.
    """

    linear: LinearSpec
    parts: tuple[SlicePart | None, ...]

    @property
    def a_rows(self) -> int:
        return sum(part.cut.a_rows for part in self.parts if part)

    def sizes(self) -> list[int]:
        """Elements of A, then of each slice's B (0 where not adapted)."""
        b_sizes = [part.cut.block_rank * part.cut.b_rows if part else 0 for part in self.parts]
        return [self.a_rows * self.linear.inputs.length, *b_sizes]

    def describe(self, addresses: Sequence[Address]) -> LinearDescriptor:
        """Descriptor of the linear, given where A and each slice's B start (the order of ``sizes``)."""
        slices = []
        h_width = 0
        a_blocks = Blocks(0, 0, 0)
        for part, address in zip(self.parts, addresses[1:], strict=True):
            if part is None:
                slices.append(NOT_ADAPTED)
                continue
            cut = part.cut
            slices.append(SliceDescriptor(cut.rank, h_width, address, cut.block_rank, cut.b))
            h_width += cut.rank
            a_blocks = cut.a
        return LinearDescriptor(h_width, self.a_rows, addresses[0], a_blocks, tuple(slices))


def most_slots(spec: ModelSpec, max_rank: int) -> int:
    """Arena rows that no adapter up to LoRA rank ``max_rank`` needs more of in a layer.

    No matrix is larger than a plain adapter's on all modules. Of two planes that are filled in turn, each matrix into
    the emptier one, the fuller holds at most half of all and half of the largest matrix (Graham, 1966).
    """
    rows = 0
    for layer in spec.layers:
        sizes = []
        for linear in layer:
            sizes.append(len(linear.outputs) * max_rank * linear.inputs.length)
            sizes += [output.length * max_rank for output in linear.outputs]
        aligned = [-(-size // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS for size in sizes]
        rows = max(rows, -(-(sum(aligned) + max(aligned)) // (2 * spec.row_width)))
    return rows


def plan_linear(linear: LinearSpec, shapes: Mapping[str, ModuleShape], spec: ModelSpec) -> LinearPlan:
    """Which parts of the checkpoint modules in ``shapes`` the TP rank of ``spec`` needs for ``linear``."""
    parts: list[SlicePart | None] = [None] * len(linear.outputs)
    for module, source in linear.sources.items():
        if module in shapes:
            for index, offset in zip(source.slices, source.offsets, strict=True):
                cut = cut_slice(linear, index, offset, source.size, shapes[module])
                parts[index] = SlicePart(module, cut) if cut else None
    return LinearPlan(linear, tuple(parts))
