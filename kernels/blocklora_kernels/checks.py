"""Checks the arguments of shrink and expand. Every message names the argument, its shape and the expected one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, HEAD_FIELDS, MAX_SLICES, SLICE_FIELDS

if TYPE_CHECKING:
    from blocklora_kernels.batch import BatchMetadata
    from blocklora_kernels.ops import LoraLinear

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_linear(
    planes: Sequence[torch.Tensor],
    slots: torch.Tensor,
    first_slots: torch.Tensor,
    descriptors: torch.Tensor,
    scalings: torch.Tensor,
    in_features: int,
    out_offsets: Sequence[int],
) -> None:
    """ValueError unless the arguments of ``LoraLinear`` fit together (see there)."""
    if len(planes) != 2:
        raise ValueError(f"planes: got {len(planes)} tensors, expected 2 (K and V)")
    for name, plane in zip("KV", planes, strict=True):
        shape, stride = tuple(plane.shape), plane.stride()
        if plane.ndim != 2 or shape[1] % 8 or stride[1] != 1 or stride[0] < shape[1]:
            raise ValueError(
                f"planes ({name}): got shape {shape} with strides {stride}, expected [slots, W], W a multiple of 8, "
                "unit stride along W and rows that do not overlap"
            )
        if plane.dtype not in DTYPES:
            raise ValueError(f"planes ({name}): got dtype {plane.dtype}, expected one of {DTYPES}")
    k, v = planes
    if (k.shape[1], k.stride(0), k.dtype, k.device) != (v.shape[1], v.stride(0), v.dtype, v.device):
        raise ValueError(
            f"planes: K has width {k.shape[1]}, row stride {k.stride(0)}, {k.dtype} on {k.device}, "
            f"V has {v.shape[1]}, {v.stride(0)}, {v.dtype} on {v.device}; expected equal"
        )
    adapters = slots.shape[0] if slots.ndim else 0
    _check_table("slots", slots, (adapters, slots.shape[-1] if slots.ndim else 0), torch.int32)
    _check_table("first_slots", first_slots, (adapters,), torch.int32)
    _check_table("descriptors", descriptors, (adapters, DESCRIPTOR_FIELDS), torch.int32)
    _check_table("scalings", scalings, (adapters, MAX_SLICES), torch.float32)
    if in_features < 1:
        raise ValueError(f"in_features: got {in_features}, expected at least 1")
    ascending = all(a <= b for a, b in pairwise(out_offsets))
    if not 2 <= len(out_offsets) <= MAX_SLICES + 1 or out_offsets[0] != 0 or not ascending:
        raise ValueError(
            f"out_offsets: got {tuple(out_offsets)}, expected 2 to {MAX_SLICES + 1} ascending values that start at 0"
        )


def _check_table(name: str, table: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(table.shape) != shape or table.dtype != dtype or table.stride(-1) != 1:
        raise ValueError(
            f"{name}: got {table.dtype} of shape {tuple(table.shape)} and strides {table.stride()}, "
            f"expected {dtype} of shape {shape}, unit stride along the last axis"
        )


def check_activations(name: str, value: torch.Tensor, width: int, dtype: torch.dtype, batch: BatchMetadata) -> None:
    """ValueError unless ``value`` is [at least batch_tokens, width] of ``dtype`` with unit stride along rows."""
    rows = batch.batch_tokens
    if value.ndim != 2 or value.shape[0] < rows or value.shape[1] != width:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{rows} or more, {width}]")
    if value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected the arena's {dtype}")
    if value.numel() and value.stride(1) != 1:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} with strides {value.stride()}, expected unit stride along its rows"
        )


def check_addresses(linear: LoraLinear, batch: BatchMetadata) -> None:
    """Debug mode: ValueError where a matrix of one of the batch's adapters leaves its slots, or a slot the arena."""
    arena_slots = linear.planes[0].shape[0]
    slots, first_slots, descriptors = linear.slots.cpu(), linear.first_slots.cpu(), linear.descriptors.cpu()
    for adapter in batch.adapters.tolist():
        if not 0 <= adapter < len(slots):
            raise ValueError(f"segments: adapter {adapter}, expected 0 to {len(slots) - 1}")
        d = descriptors[adapter].tolist()
        if d[0] > batch.h_width:
            raise ValueError(f"descriptors[{adapter}]: h_width {d[0]}, expected at most {batch.h_width} (batch.h)")
        sizes = [(d[3], d[4], d[1] * linear.in_features)] if d[0] else []
        for i, (first, end) in enumerate(pairwise(linear.out_offsets)):
            s = d[HEAD_FIELDS + i * SLICE_FIELDS :]
            sizes += [(s[3], s[4], (end - first) * s[5])] if s[0] else []
        for row, column, size in sizes:
            stop = row + -(-(column + size) // linear.width)
            if row < 0 or stop > slots.shape[1]:
                raise ValueError(
                    f"descriptors[{adapter}]: rows {row} to {stop}, expected within the {slots.shape[1]} of slots"
                )
            first_slot = int(first_slots[adapter])
            used = slots[adapter, row:stop] if first_slot < 0 else torch.arange(row, stop) + first_slot
            if len(used) and not 0 <= int(used.min()) <= int(used.max()) < arena_slots:
                raise ValueError(
                    f"slots[{adapter}]: {int(used.min())} to {int(used.max())}, expected 0 to {arena_slots - 1}"
                )
