"""S-LoRA's sharding of plain LoRA: both factors split over all TP ranks, at the price of collectives.

Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters" (arXiv 2311.03285), section 6; the same as vLLM's
``fully_sharded_loras``. For TP rank d of N and LoRA rank r:

    column  h_d = x A_d^T, A_d rows [d * r/N, (d + 1) * r/N) of A; all-gather of h; B_d: the rank's own output rows
    row     h_d = x_d A_d^T, A_d the rank's own input columns; all-reduce of h; B_d rows [d * out/N, (d + 1) * out/N)
            of B, added to those columns of the partial output, which the base layer's own all-reduce sums

Where N does not divide r or out, shares are rounded up: the last ranks' rows of A are zeros, their rows of B fewer.
A linear is cut so where all modules that feed it are plain: that follows from their shapes, so all ranks decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor
from sglang_blocklora.sharding import plan
from sglang_blocklora.sharding.cut import ModuleShape, SliceCut
from sglang_blocklora.sharding.linears import Interval, LinearSpec, ModelSpec
from sglang_blocklora.sharding.plan import LinearPlan, SlicePart


class SplitDescriptor(LinearDescriptor):
    """Of a linear whose B reads h only after the TP ranks have put their parts of it together.

    shares  rows of each adapted slice's local A
    """

    shares: tuple[int, ...]


@dataclass(frozen=True)
class SplitPlan(LinearPlan):
    """The parts of a linear that is cut S-LoRA's way."""

    @property
    def shares(self) -> tuple[int, ...]:
        """Rows of each adapted slice's local A."""
        return tuple(part.cut.a_rows for part in self.parts if part)

    def describe(self, addresses: Sequence[Address]) -> SplitDescriptor:
        descriptor = SplitDescriptor(*super().describe(addresses))
        descriptor.shares = self.shares
        return descriptor


def plan_linear(linear: LinearSpec, shapes: Mapping[str, ModuleShape], spec: ModelSpec) -> LinearPlan:
    """In place of the product's: other linears than plain ones, and a single TP rank, are left to it."""
    own = {module: shapes[module] for module in linear.sources if module in shapes}
    if spec.tp_size == 1 or not own or any(shape.structure != "plain" for shape in own.values()):
        return plan.plan_linear(linear, shapes, spec)
    parts: list[SlicePart | None] = [None] * len(linear.outputs)
    for module, shape in own.items():
        source = linear.sources[module]
        for index, offset in zip(source.slices, source.offsets, strict=True):
            parts[index] = SlicePart(module, cut_slice(linear, index, offset, source.size, shape, spec))
    return SplitPlan(linear, tuple(parts))


def own_share(size: int, tp_rank: int, tp_size: int) -> Interval:
    """The TP rank's part of an axis that all ranks share out; shorter, even empty, on the last ranks."""
    share = -(-size // tp_size)
    return Interval(min(share * tp_rank, size), min(share * (tp_rank + 1), size), size)


def cut_slice(
    linear: LinearSpec, slice_index: int, offset: int, size: int, shape: ModuleShape, spec: ModelSpec
) -> SliceCut:
    """Which part of a plain module the TP rank of ``spec`` holds for one slice of ``linear``.

    offset, size  the slice's first row in the module and the module's rows (``Source``)
    A TP rank that holds only padding of the slice has its part of the other factor all the same.
    """
    r, output, tp_rank, tp_size = shape.rank, linear.outputs[slice_index], spec.tp_rank, spec.tp_size
    inputs = linear.inputs.real
    column = linear.kind == "column"
    rows = output.within(offset, size) if column else own_share(output.size, tp_rank, tp_size)
    b_rows = output.length if column else rows.length
    return SliceCut(
        rank=r,
        first_rank=own_share(r, tp_rank, tp_size).start if column else 0,
        first_block=0,
        inputs=inputs,
        outputs=rows,
        a=Blocks(1, linear.inputs.length, 0),
        a_rows=-(-r // tp_size) if column else r,
        b=Blocks(1, b_rows, 0),
        b_rows=b_rows,
        block_rank=r,
    )


def out_offsets(linear: LinearSpec, tp_rank: int, tp_size: int) -> tuple[int, ...]:
    """[slices + 1] local output columns that the rows of each slice's local B add to, as ``LinearSpec.out_offsets``."""
    if linear.kind == "column":
        return linear.out_offsets
    own = own_share(linear.outputs[0].size, tp_rank, tp_size)
    return own.start, own.stop
