"""Reads from an adapter's folder what one TP rank holds of it, and packs that in the order of the rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES, Address, LinearDescriptor
from blocklora_kernels.table import pack_entry

from sglang_blocklora.adapters.checkpoint import Checkpoint
from sglang_blocklora.adapters.config import read_config
from sglang_blocklora.adapters.notes import notes
from sglang_blocklora.adapters.tokenizer_files import check_tokens
from sglang_blocklora.adapters.validate import AdaptedModule, check_modules
from sglang_blocklora.sharding.cut import read_a, read_b
from sglang_blocklora.sharding.layout import place
from sglang_blocklora.sharding.linears import ModelSpec, Part
from sglang_blocklora.sharding.plan import LinearPlan, plan_linear

logger = logging.getLogger(__name__)

# Of a factor that is transposed, at once: what is read and written stays in the processor's first cache.
PIECE_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class AdapterShard:
    """An adapter on one TP rank: all that must be known of it to use its rows.

    rank, nblocks  the largest full LoRA rank and block count among its modules
    invocation     token ids from whose last occurrence in a prompt on the adapter is active; empty: for all tokens
    parts          what the adapter is on, whatever of that this TP rank holds
    slots          arena rows that this TP rank's part needs in every layer
    descriptors    [layer][linear], where each factor lies in those rows
    scalings       [layer][linear][slice], alpha / r of the full rank (0 where not adapted)
    entry          both of them as the kernels' table has them (``pack_entry``)
    """

    name: str
    rank: int
    nblocks: int
    invocation: tuple[int, ...] = ()
    parts: frozenset[Part] = frozenset()
    slots: int
    descriptors: tuple[tuple[LinearDescriptor, ...], ...]
    scalings: tuple[tuple[tuple[float, ...], ...], ...]
    entry: torch.Tensor = field(compare=False, repr=False)

    @cached_property
    def local_rank(self) -> int:
        """The largest local rank of a slice on this TP rank."""
        return max(descriptor.largest_rank for layer in self.descriptors for descriptor in layer)


def load_shard(
    name: str, folder: Path, spec: ModelSpec, max_rank: int, *, pin_memory: bool = False, known: bool = False
) -> tuple[AdapterShard, torch.Tensor]:
    """Read the adapter in ``folder`` and cut it for the TP rank of ``spec``.

    max_rank    largest full LoRA rank that is accepted
    pin_memory  whether the image lies in page-locked memory, from which a GPU copies beside other work
    known       it was loaded before: a tokenizer beside it is not looked at again, and nothing is told again
    Returns the shard and its image [layers, 2, slots, W] in the model's dtype: the rows to copy into the arena, K plane
    then V plane, zeros outside the matrices. Reads only the rank's own part of the weights. Raises ``AdapterError``;
    nothing is kept then.
    """
    config = read_config(name, folder)
    with Checkpoint(name, folder, config) as checkpoint:
        modules = check_modules(name, config, checkpoint.shapes, spec, max_rank)
        if not known:
            check_tokens(name, folder, spec.vocab_size)
        shapes = {path: module.shape for path, module in modules.items()}
        plans = [[plan_linear(linear, shapes, spec) for linear in layer] for layer in spec.layers]
        layouts = [place([size for plan in layer for size in plan.sizes()], spec.row_width) for layer in plans]
        slots = max(layout.rows for layout in layouts)
        image = _zeros((len(plans), 2, slots, spec.row_width), spec.dtype, pin_memory)
        descriptors = []
        for layer, layout, planes in zip(plans, layouts, _bits(image), strict=True):
            addresses = _split(layout.addresses, layer)
            for plan, own in zip(layer, addresses, strict=True):
                _copy_factors(plan, own, planes, spec.dtype, modules, checkpoint)
            descriptors.append(tuple(plan.describe(own) for plan, own in zip(layer, addresses, strict=True)))
    if not known and spec.tp_rank == 0:
        for note in notes(name, folder, config, modules, spec):
            logger.warning("adapter %r: %s", name, note)
    positions = spec.find()
    parts = frozenset(spec.layers[layer][index].part for layer, index in map(positions.__getitem__, modules))
    scalings = tuple(tuple(_scalings(plan, modules) for plan in layer) for layer in plans)
    shard = AdapterShard(
        name=name,
        rank=max(shape.rank for shape in shapes.values()),
        nblocks=max(shape.nblocks for shape in shapes.values()),
        invocation=tuple(config.invocation),
        parts=parts,
        slots=slots,
        descriptors=tuple(descriptors),
        scalings=scalings,
        entry=_entry(descriptors, scalings, pin_memory),
    )
    return shard, image


def _split(addresses: tuple[Address, ...], layer: list[LinearPlan]) -> list[tuple[Address, ...]]:
    """Addresses of a layer's matrices, linear by linear (A, then one B per slice)."""
    rest = iter(addresses)
    return [tuple(next(rest) for _ in range(1 + len(plan.parts))) for plan in layer]


def _copy_factors(
    plan: LinearPlan,
    addresses: tuple[Address, ...],
    planes: np.ndarray,
    dtype: torch.dtype,
    modules: Mapping[str, AdaptedModule],
    checkpoint: Checkpoint,
) -> None:
    """Read the factors of one linear into ``planes`` [2, slots, W], bits of ``dtype`` that are 0 where padding stays.

    Values are cast once, from the stored dtype.
    """
    a = _matrix(planes, addresses[0], plan.a_rows, plan.linear.inputs.length)
    a_row = 0
    for part, address in zip(plan.parts, addresses[1:], strict=True):
        if part is None:
            continue
        cut, module = part.cut, modules[part.module]
        read = partial(checkpoint.read, module.name)
        values = _bits(read_a(plan.linear, cut, module.shape, read).to(dtype))
        a[a_row : a_row + len(values), : values.shape[1]] = values
        a_row += cut.a_rows
        b = _matrix(planes, address, cut.block_rank, cut.b_rows)
        values = _bits(read_b(plan.linear, cut, module.shape, read).to(dtype))
        for start in range(0, len(values), PIECE_ROWS):
            piece = values[start : start + PIECE_ROWS]
            b[:, start : start + len(piece)] = piece.T


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    if pin_memory or not math.prod(shape):  # nothing, on a TP rank that holds only padding
        return torch.zeros(shape, dtype=dtype, pin_memory=pin_memory)
    # NumPy leaves it to the system, in huge pages; torch writes zeros over the system's, page by page.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _bits(values: torch.Tensor) -> np.ndarray:
    """The same memory as whole numbers: NumPy, which transposes faster than torch, has no bfloat16."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]).numpy()


def _matrix(planes: np.ndarray, address: Address, rows: int, columns: int) -> np.ndarray:
    start = address.row * planes.shape[2] + address.column
    plane: np.ndarray = planes[address.plane].reshape(-1)
    return plane[start : start + rows * columns].reshape(rows, columns)


def _entry(
    descriptors: Sequence[Sequence[LinearDescriptor]],
    scalings: Sequence[Sequence[Sequence[float]]],
    pin_memory: bool,
) -> torch.Tensor:
    shape = (len(descriptors), max(map(len, descriptors)))
    packed, factors = np.zeros((*shape, DESCRIPTOR_FIELDS), np.int32), np.zeros((*shape, MAX_SLICES), np.float32)
    for i, layer in enumerate(descriptors):
        for j, descriptor in enumerate(layer):
            packed[i, j] = descriptor.pack()
            factors[i, j, : len(scalings[i][j])] = scalings[i][j]
    return pack_entry(packed, factors, pin_memory=pin_memory)


def _scalings(plan: LinearPlan, modules: Mapping[str, AdaptedModule]) -> tuple[float, ...]:
    return tuple(modules[part.module].scaling if part else 0.0 for part in plan.parts)
