"""Checks the arguments of shrink and expand. Every message names the argument, its shape and the expected one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES

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


def check_activations(name: str, value: torch.Tensor, width: int, dtype: torch.dtype, rows: int) -> None:
    """ValueError unless ``value`` is [at least ``rows``, width] of ``dtype`` with unit stride along rows."""
    if value.ndim != 2 or value.shape[0] < rows or value.shape[1] != width:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected [{rows} or more, {width}]")
    if value.dtype != dtype:
        raise ValueError(f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected the arena's {dtype}")
    if value.numel() and value.stride(1) != 1:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} with strides {value.stride()}, expected unit stride along its rows"
        )
