"""Holds, on the device, where the rows of resident adapters are and how the kernels read them."""

from __future__ import annotations

import numpy as np
import torch

from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES


class AdapterTable:
    """Slot table, descriptors and scalings of up to ``adapters`` adapters, at fixed addresses (CUDA graphs read them).

    slots        int32 [adapters, max_slots], physical arena row of each of the adapter's rows
    first_slots  int32 [adapters], first slot where an adapter's slots are one contiguous run, else -1
    descriptors  int32 [layers, linears, adapters, DESCRIPTOR_FIELDS]
    scalings     float32 [layers, linears, adapters, MAX_SLICES]
    An entry that was never written, or was cleared, is not adapted anywhere.
    """

    def __init__(
        self, layers: int, linears: int, adapters: int, max_slots: int, arena_slots: int, device: torch.device
    ) -> None:
        """``arena_slots`` is the number of physical rows of a plane; ``write`` refuses slots beyond it."""
        self.arena_slots = arena_slots
        self.slots = torch.zeros(adapters, max_slots, dtype=torch.int32, device=device)
        self.first_slots = torch.full((adapters,), -1, dtype=torch.int32, device=device)
        self.descriptors = torch.zeros(layers, linears, adapters, DESCRIPTOR_FIELDS, dtype=torch.int32, device=device)
        self.scalings = torch.zeros(layers, linears, adapters, MAX_SLICES, dtype=torch.float32, device=device)

    def write(self, adapter: int, slots: np.ndarray, descriptors: np.ndarray, scalings: np.ndarray) -> None:
        """Set entry ``adapter``, in stream order.

        slots        int [S], S <= max_slots
        descriptors  int32 [layers, linears, DESCRIPTOR_FIELDS], ``LinearDescriptor.pack`` of each linear
        scalings     float32 [layers, linears, MAX_SLICES]
        """
        self._check(adapter, slots, descriptors, scalings)
        self.slots[adapter, : len(slots)].copy_(torch.from_numpy(slots.astype(np.int32)))
        run = len(slots) > 0 and bool((np.diff(slots) == 1).all())
        self.first_slots[adapter] = int(slots[0]) if run else -1
        self.descriptors[:, :, adapter].copy_(torch.from_numpy(np.ascontiguousarray(descriptors, np.int32)))
        self.scalings[:, :, adapter].copy_(torch.from_numpy(np.ascontiguousarray(scalings, np.float32)))

    def clear(self, adapter: int) -> None:
        """Forget entry ``adapter``: its tokens are served as base-model tokens."""
        self.descriptors[:, :, adapter] = 0

    def _check(self, adapter: int, slots: np.ndarray, descriptors: np.ndarray, scalings: np.ndarray) -> None:
        layers, linears, adapters, fields = self.descriptors.shape
        if not 0 <= adapter < adapters:
            raise ValueError(f"adapter: got {adapter}, expected 0 to {adapters - 1}")
        if slots.ndim != 1 or len(slots) > self.slots.shape[1]:
            raise ValueError(f"slots: got shape {slots.shape}, expected [S] with S <= {self.slots.shape[1]}")
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < self.arena_slots:
            raise ValueError(f"slots: got {slots.min()} to {slots.max()}, expected 0 to {self.arena_slots - 1}")
        if descriptors.shape != (layers, linears, fields):
            raise ValueError(f"descriptors: got {descriptors.shape}, expected {(layers, linears, fields)}")
        if scalings.shape != (layers, linears, MAX_SLICES):
            raise ValueError(f"scalings: got {scalings.shape}, expected {(layers, linears, MAX_SLICES)}")
