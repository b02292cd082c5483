"""Holds, on the device, where the rows of resident adapters are and how the kernels read them."""

from __future__ import annotations

import numpy as np
import torch

from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES

# Of a linear: its descriptor, then its scalings as float32 bits. Both start on 16 bytes, whichever the linear, so one
# compiled kernel serves all.
SCALINGS_START = -(-DESCRIPTOR_FIELDS // 4) * 4
ENTRY_FIELDS = SCALINGS_START + -(-MAX_SLICES // 4) * 4


def pack_entry(descriptors: np.ndarray, scalings: np.ndarray, *, pin_memory: bool = False) -> torch.Tensor:
    """What a table says of one adapter, ready to be copied: int32 [layers, linears, ENTRY_FIELDS].

    descriptors  int32 [layers, linears, DESCRIPTOR_FIELDS], ``LinearDescriptor.pack`` of each linear
    scalings     float32 [layers, linears, MAX_SLICES]
    pin_memory   in page-locked memory, from which a GPU copies while the host goes on
    Never changed afterwards, so a copy that is still queued needs no guard.
    """
    layers, linears = descriptors.shape[:2]
    if descriptors.shape != (layers, linears, DESCRIPTOR_FIELDS) or scalings.shape != (layers, linears, MAX_SLICES):
        raise ValueError(
            f"descriptors, scalings: got shapes {descriptors.shape} and {scalings.shape}, expected "
            f"[layers, linears, {DESCRIPTOR_FIELDS}] and [layers, linears, {MAX_SLICES}]"
        )
    entry = torch.zeros(layers, linears, ENTRY_FIELDS, dtype=torch.int32, pin_memory=pin_memory)
    packed = entry.numpy()
    packed[..., :DESCRIPTOR_FIELDS] = descriptors
    packed.view(np.float32)[..., SCALINGS_START : SCALINGS_START + MAX_SLICES] = scalings
    return entry


class AdapterTable:
    """Slot table, descriptors and scalings of up to ``adapters`` adapters, at fixed addresses (CUDA graphs read them).

    slots        int32 [adapters, max_slots], physical arena row of each of the adapter's rows
    first_slots  int32 [adapters], first slot where an adapter's slots are one contiguous run, else -1
    descriptors  int32 [layers, linears, adapters, DESCRIPTOR_FIELDS]
    scalings     float32 [layers, linears, adapters, MAX_SLICES]
    An entry that was never written, or was cleared, is not adapted anywhere.
    """

    def __init__(self, layers: int, linears: int, adapters: int, max_slots: int, device: torch.device) -> None:
        width = -(-max_slots // 16) * 16  # rows of the table start on multiples of 16 bytes, like entries
        self.slots = torch.zeros(adapters, width, dtype=torch.int32, device=device)
        self.first_slots = torch.full((adapters,), -1, dtype=torch.int32, device=device)
        # Adapter first: an entry is one run of bytes, which one copy brings.
        self._entries = torch.zeros(adapters, layers, linears, ENTRY_FIELDS, dtype=torch.int32, device=device)
        of_linear = self._entries.permute(1, 2, 0, 3)
        self.descriptors = of_linear[..., :DESCRIPTOR_FIELDS]
        self.scalings = of_linear.view(torch.float32)[..., SCALINGS_START : SCALINGS_START + MAX_SLICES]

    def write(self, adapter: int, slots: torch.Tensor, entry: torch.Tensor) -> None:
        """Set entry ``adapter``, in stream order; the host waits for nothing.

        slots  int64 [S] on the table's device, S <= max_slots: rows of the arena, which only the device knows
        entry  ``pack_entry``, page-locked for a GPU
        """
        self._check(adapter, slots, entry)
        self._entries[adapter].copy_(entry, non_blocking=True)
        if not len(slots):
            return
        if slots.is_cuda:  # they may be freed before this has run
            slots.record_stream(torch.cuda.current_stream(slots.device))
        row = self.slots[adapter, : len(slots)]
        row.copy_(slots)
        is_run = (row[1:] - row[:-1] == 1).all()
        # ``row[0] if is_run else -1``; torch.where would copy its -1 from pageable memory.
        self.first_slots[adapter].copy_((row[0] + 1) * is_run - 1)

    def clear(self, adapter: int) -> None:
        """Forget entry ``adapter``: its tokens are served as base-model tokens."""
        self._entries[adapter].zero_()

    def _check(self, adapter: int, slots: torch.Tensor, entry: torch.Tensor) -> None:
        adapters, *shape = self._entries.shape
        if not 0 <= adapter < adapters:
            raise ValueError(f"adapter: got {adapter}, expected 0 to {adapters - 1}")
        if slots.ndim != 1 or len(slots) > self.slots.shape[1]:
            raise ValueError(f"slots: got shape {tuple(slots.shape)}, expected [S] with S <= {self.slots.shape[1]}")
        if slots.device != self.slots.device or slots.dtype != torch.int64:
            raise ValueError(f"slots: got {slots.dtype} on {slots.device}, expected int64 on {self.slots.device}")
        if list(entry.shape) != shape or entry.dtype != torch.int32:
            raise ValueError(
                f"entry: got {entry.dtype} of shape {tuple(entry.shape)}, expected int32 of {tuple(shape)}"
            )
