"""Mixed batches with their float64 answer, written from dense algebra alone (no code of the reference or the kernels).

An adapter is drawn as a whole, unsharded block-diagonal adapter; its delta is computed densely and then cut to one TP
rank. The packed local factors that the operations read are cut from the same matrices by the rules of docs/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor, SliceDescriptor

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


@dataclass(frozen=True)
class Part:
    """One slice of one adapter: ``rank`` of the whole adapter (0: not adapted) and its ``nblocks``."""

    rank: int
    nblocks: int = 1


@dataclass(frozen=True)
class Shape:
    """A linear on one TP rank.

    column-parallel: input width ``width``, slices cut from ``full[s]`` outputs to the interval ``local[s]``;
    row-parallel: output width ``width``, inputs cut from ``full[0]`` to ``local[0]``.
    """

    width: int
    full: tuple[int, ...]
    local: tuple[tuple[int, int], ...]
    row_parallel: bool = False

    @property
    def in_features(self) -> int:
        return self.local[0][1] - self.local[0][0] if self.row_parallel else self.width

    @property
    def out_offsets(self) -> tuple[int, ...]:
        widths = [self.width] if self.row_parallel else [stop - start for start, stop in self.local]
        return tuple(np.cumsum([0, *widths]).tolist())


@dataclass
class Case:
    """Everything that an operation takes, as numpy, and the answer. See ``build``."""

    planes: list[np.ndarray]
    slots: list[np.ndarray]
    descriptors: list[LinearDescriptor]
    scalings: np.ndarray
    in_features: int
    out_offsets: tuple[int, ...]
    adapters: np.ndarray
    x: np.ndarray
    out: np.ndarray
    gap: int  # elements of NaN between the rows of the planes
    expected: np.ndarray = field(default_factory=lambda: np.empty(0))
    budget: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def rank(self) -> int:
        """The largest local rank of a slice."""
        return max(descriptor.largest_rank for descriptor in self.descriptors)

    def check(self, result: np.ndarray) -> None:
        """Every element within its own error budget; rows of the base model and unadapted slices bit for bit."""
        untouched = self.budget == 0
        np.testing.assert_array_equal(result[untouched], self.out[untouched])
        error = np.abs(result.astype(np.float64) - self.expected)
        worst = np.unravel_index(np.nanargmax(error - self.budget), error.shape) if error.size else ()
        assert bool((error <= self.budget)[~untouched].all()), (
            f"at {worst}: error {error[worst]}, budget {self.budget[worst]}, got {result[worst]}"
        )


class Arena:
    """Planes full of NaN, into which matrices are written element by element at places drawn at random."""

    def __init__(self, rng: np.random.Generator, width: int, stride: int, slots: int, dtype: str) -> None:
        self.rng, self.width, self.gap = rng, width, stride - width
        self.planes = [np.full((slots, width), np.nan, "float32" if dtype == "bfloat16" else dtype) for _ in range(2)]
        self.free = rng.permutation(slots)

    def take(self, count: int, contiguous: bool) -> np.ndarray:
        if contiguous:
            self.free = np.sort(self.free)
            runs = np.flatnonzero(self.free[count - 1 :] - self.free[: len(self.free) - count + 1] == count - 1)
            taken = self.free[runs[0] : runs[0] + count]
        else:
            taken = self.rng.permutation(self.free)[:count]
        self.free = np.setdiff1d(self.free, taken)
        return taken


def place(
    arena: Arena, matrices: list[np.ndarray], contiguous: bool, alignment: int
) -> tuple[np.ndarray, list[Address]]:
    """Write the matrices of one adapter at random planes, gaps and columns (multiples of ``alignment``)."""
    rng, width = arena.rng, arena.width
    ends = [0, 0]
    addresses = []
    for matrix in matrices:
        plane = int(rng.integers(2))
        start = -(-(ends[plane] + int(rng.integers(width))) // alignment) * alignment
        ends[plane] = start + matrix.size
        addresses.append(Address(plane, start // width, start % width))
    slots = arena.take(max(1, -(-max(ends) // width)), contiguous)
    for matrix, (plane, row, column) in zip(matrices, addresses, strict=True):
        e = column + np.arange(matrix.size)
        arena.planes[plane][slots[row + e // width], e % width] = matrix.ravel()
    return slots, addresses


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    """Normal values of ``dtype``; numpy has no bfloat16, so those are rounded and held in float32."""
    values = rng.standard_normal(shape) * scale
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values.astype(dtype)


def dense_blocks(packed: np.ndarray, nblocks: int) -> np.ndarray:
    """block_diag of the ``nblocks`` chunks of ``packed`` [n * a, b] along its rows: [n * a, n * b], float64."""
    a, b = packed.shape[0] // nblocks, packed.shape[1]
    dense = np.zeros((nblocks * a, nblocks * b))
    for i in range(nblocks):
        dense[i * a : (i + 1) * a, i * b : (i + 1) * b] = packed[i * a : (i + 1) * a]
    return dense


def column_adapter(rng, shape, parts, scalings, dtype, arena, contiguous, alignment):
    """Slots, descriptor and dense (A [r, in], B [local out, r], scaling) of each slice of a column-parallel adapter."""
    a_parts, b_parts, dense, plans = [], [], [], []
    h_start = 0
    for part, full, (start, stop), scaling in zip(parts, shape.full, shape.local, scalings, strict=True):
        if part.rank == 0:
            plans.append(None)
            dense.append(None)
            continue
        n, per_block, size = part.nblocks, part.rank // part.nblocks, full // part.nblocks
        a, b = draw(rng, (part.rank, shape.width), dtype), draw(rng, (full, per_block), dtype, 0.3)
        dense.append((a.astype(np.float64), dense_blocks(b, n)[start:stop], scaling))
        first, last = start // size, (stop - 1) // size
        a_parts.append(a[first * per_block : (last + 1) * per_block])
        b_parts.append(b[start:stop])
        count = last - first + 1
        plans.append((h_start, per_block, Blocks(count, size, start - first * size)))
        h_start += count * per_block
    if not a_parts:
        empty = SliceDescriptor(0, 0, Address(0, 0, 0), 0, Blocks(0, 0, 0))
        nothing = LinearDescriptor(0, 0, Address(0, 0, 0), Blocks(0, 0, 0), (empty,) * len(parts))
        return arena.take(1, contiguous), nothing, dense
    matrices = [np.concatenate(a_parts), *(b.T for b in b_parts)]
    slots, (a_address, *b_addresses) = place(arena, matrices, contiguous, alignment)
    places = iter(b_addresses)
    slices = tuple(
        SliceDescriptor(0, 0, Address(0, 0, 0), 0, Blocks(0, 0, 0))
        if plan is None
        else SliceDescriptor(plan[1] * plan[2].count, plan[0], next(places), plan[1], plan[2])
        for plan in plans
    )
    descriptor = LinearDescriptor(h_start, h_start, a_address, Blocks(1, shape.width, 0), slices)
    return slots, descriptor, dense


def row_adapter(rng, shape, parts, scalings, dtype, arena, contiguous, alignment):
    """As ``column_adapter`` for a row-parallel linear: A is the block-diagonal factor and its columns are cut."""
    (part,), (start, stop), full = parts, shape.local[0], shape.full[0]
    if part.rank == 0:
        column = Shape(shape.width, (shape.width,), ((0, shape.width),))
        return column_adapter(rng, column, parts, scalings, dtype, arena, contiguous, alignment)
    n, per_block, size = part.nblocks, part.rank // part.nblocks, full // part.nblocks
    packed, b = draw(rng, (part.rank, size), dtype), draw(rng, (shape.width, part.rank), dtype, 0.3)
    dense = [(dense_blocks(packed, n)[:, start:stop], b.astype(np.float64), scalings[0])]
    first, last = start // size, (stop - 1) // size
    chunks = packed.reshape(n, per_block, size).transpose(1, 0, 2).reshape(per_block, full)  # [k, column of the input]
    local_b = b[:, first * per_block : (last + 1) * per_block]
    count = last - first + 1
    width = count * per_block
    a, blocks = chunks[:, start:stop], Blocks(count, size, start - first * size)
    if count > 1 and (stop - start) % 8 == 0 and (blocks.size % 8 or blocks.offset % 8):  # as docs/kernels.md says
        a = dense_blocks(packed, n)[first * per_block : (last + 1) * per_block, start:stop].astype(packed.dtype)
        blocks = Blocks(1, stop - start, 0)
    slots, (a_address, b_address) = place(arena, [a, local_b.T], contiguous, alignment)
    whole = SliceDescriptor(width, 0, b_address, width, Blocks(1, shape.width, 0))
    return (
        slots,
        LinearDescriptor(width, len(a), a_address, blocks, (whole,)),
        dense,
    )


def build(
    shape: Shape,
    adapters: list[list[Part]],
    tokens: np.ndarray,
    *,
    seed: int = 0,
    dtype: str = "float32",
    width: int = 64,
    stride: int | None = None,
    arena_slots: int = 512,
    contiguous: bool = False,
    alignment: int = 8,
    choices: int = 1,
    weights: np.ndarray | None = None,
) -> Case:
    """A case of ``tokens`` [T] (adapter of each token, negative for the base model).

    choices  so many rows that follow one another have the same x
    weights  float32 [T], what each row's delta is multiplied with

    Arena rows and elements that belong to no matrix are NaN, as are the gaps between rows where stride > width.
    """
    rng = np.random.default_rng(seed)
    arena = Arena(rng, width, stride or width, arena_slots, dtype)
    scalings = rng.choice([0.25, 0.5, 1.5, 2.0], (len(adapters), 3)).astype(np.float32)
    x = np.repeat(draw(rng, (len(tokens) // choices, shape.in_features), dtype), choices, axis=0)
    factor = np.ones((len(tokens), 1)) if weights is None else weights.astype(np.float64)[:, None]
    out = draw(rng, (len(tokens), shape.out_offsets[-1]), dtype)
    expected, budget = out.astype(np.float64), np.zeros(out.shape)
    u, x64 = UNIT_ROUNDOFF[dtype], x.astype(np.float64)
    make = row_adapter if shape.row_parallel else column_adapter
    slots, descriptors = [], []
    for i, parts in enumerate(adapters):
        own_slots, descriptor, dense = make(
            rng, shape, parts, scalings[i, : len(parts)], dtype, arena, contiguous, alignment
        )
        slots.append(own_slots)
        descriptors.append(descriptor)
        rows = np.flatnonzero(tokens == i)
        for s, factors in enumerate(dense):
            if factors is None or len(rows) == 0:
                continue
            a, b, scaling = factors
            columns = slice(shape.out_offsets[s], shape.out_offsets[s + 1])
            expected[rows, columns] += factor[rows] * scaling * (x64[rows] @ a.T) @ b.T
            # float32 sums of products, h rounded to dtype (with underflow), one rounding of the result.
            size = np.abs(factor[rows]) * scaling * (np.abs(x64[rows]) @ np.abs(a.T)) @ np.abs(b.T)
            steps = a.shape[1] + 2 * b.shape[1] + 16
            underflow = SMALLEST[dtype] * (1 + np.abs(factor[rows]) * scaling * np.abs(b).sum(1))
            error = (u + steps * 2.0**-24) * size + underflow
            budget[rows, columns] = error * (1 + u) + 2 * u * np.abs(expected[rows, columns])
    return Case(
        arena.planes,
        slots,
        descriptors,
        scalings,
        shape.in_features,
        shape.out_offsets,
        tokens,
        x,
        out,
        arena.gap,
        expected,
        budget,
    )


QKV = Shape(72, (96, 48, 48), ((32, 64), (16, 32), (16, 32)))  # TP rank 1 of 3
GATE_UP = Shape(40, (90, 90), ((30, 75), (30, 75)))
DOWN = Shape(56, (160,), ((40, 120),), row_parallel=True)

MIXED = {
    QKV: [[Part(6, 3), Part(4, 2), Part(0)], [Part(17), Part(5), Part(33)], [Part(24, 6), Part(16, 2), Part(1)]],
    GATE_UP: [[Part(6, 2), Part(9, 3)], [Part(0), Part(40)], [Part(5, 5), Part(30, 15)]],
    DOWN: [[Part(8, 4)], [Part(20, 10)], [Part(3)]],
}


def zipf(tokens: int, adapters: int, seed: int = 0) -> np.ndarray:
    return np.minimum(np.random.default_rng(seed).zipf(1.5, tokens) - 1, adapters) - 1  # -1: the base model
