"""The arena of ``--adapter-memory static``: memory of our own, apart from the KV cache."""

from __future__ import annotations

import numpy as np
import torch


class StaticArena:
    """Rows for adapter weights: per layer a K and a V plane of ``slots`` rows of ``row_width`` elements.

    Owns one tensor ``[layers, 2, slots, W]`` and its free list. A slot is the same row in every layer and plane;
    ``planes[layer]`` is (K, V), each [slots, W].
    """

    def __init__(self, layers: int, slots: int, row_width: int, dtype: torch.dtype, device: torch.device) -> None:
        # Left uninitialised: rows are written before they are read, and untouched pages cost no memory on a CPU.
        self._rows = torch.empty(layers, 2, slots, row_width, dtype=dtype, device=device)
        self.planes = [tuple(layer) for layer in self._rows]
        self._free = np.ones(slots, dtype=bool)

    @property
    def total_slots(self) -> int:
        return len(self._free)

    @property
    def free_slots(self) -> int:
        return int(self._free.sum())

    def allocate(self, count: int) -> torch.Tensor | None:
        """Take ``count`` slots, int64 [count] on the host and ascending; None if fewer are free.

        The first run of adjacent slots that is long enough (zero-copy views), else the lowest free ones.
        """
        free = np.flatnonzero(self._free)
        if len(free) < count:
            return None
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = int(starts[0]) if len(starts) else 0
        taken = free[first : first + count]
        self._free[taken] = False
        return torch.from_numpy(taken)

    def on_device(self, slots: torch.Tensor) -> torch.Tensor:
        """``slots`` of ``allocate`` on the arena's device, for which the host does not wait."""
        device = self._rows.device
        return (slots.pin_memory() if device.type == "cuda" else slots).to(device, non_blocking=True)

    def free(self, slots: torch.Tensor) -> None:
        """Give ``slots`` back. ``ValueError`` if one of them is free already."""
        index = slots.numpy()
        if self._free[index].any():
            raise ValueError(f"slots {index[self._free[index]].tolist()} are freed twice")
        self._free[index] = True

    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None:
        """Copy a packed image [layers, 2, S, W] into ``slots[:S]``; ordered with the current stream's work."""
        self._rows.index_copy_(2, slots[: image.shape[2]].to(self._rows.device), image.to(self._rows.device))
