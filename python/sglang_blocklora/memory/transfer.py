"""Copies images to the arena, beside the forward pass and in order with it on the device."""

from __future__ import annotations

from typing import Protocol

import torch


class Rows(Protocol):
    """An arena, to which images are written."""

    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None: ...


class Transfer:
    """Copies on a stream of its own.

    ``copy`` copies; ``join``, called where a forward pass begins, makes that wait for all copies so far.

    With the overlap schedule a forward pass may still be running whose requests have ended: it reads or writes slots
    that are free again for the host. So the rows are written after all work that is queued on the stream where ``join``
    was called last; the copy from the host goes on before. The host never waits and never asks for an event.
    On a device without streams ``copy`` copies at once.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """``device`` is the arena's; None: one without streams."""
        self._device = device
        self._side = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        self._forward: torch.cuda.Stream | None = None
        self._done = torch.cuda.Event() if self._side else None

    def copy(self, arena: Rows, slots: torch.Tensor, image: torch.Tensor) -> None:
        """Write an image [layers, 2, S, W] from host memory to ``slots`` int64 (on the host or the device)."""
        if self._side is None or self._done is None:
            arena.write(slots, image)
            return
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._side):
            staged = image.to(self._device, non_blocking=True)
            if slots.is_cuda:
                slots.record_stream(self._side)
            else:  # from page-locked memory, or the host would wait for the copy
                slots = slots.pin_memory().to(self._device, non_blocking=True)
            self._side.wait_stream(current)  # where the allocator chose the slots
            if self._forward is not None:
                self._side.wait_stream(self._forward)
            arena.write(slots, staged)
            self._done.record()

    def join(self) -> None:
        """Make the current stream, on which a forward pass is about to be queued, wait for all copies so far."""
        if self._done is not None:
            self._forward = torch.cuda.current_stream(self._device)
            self._forward.wait_event(self._done)
