"""Runs shrink beside the base model's GEMM, on a second stream that is ordered by events on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_beside(device: torch.device, *others: torch.cuda.Stream) -> torch.cuda.Stream:
    """A stream that is none of ``others``: torch hands out the same 32 in turn, so a new one may be somebody's."""
    while (stream := torch.cuda.Stream(device)) in others:
        pass
    return stream


class SideStream:
    """A second stream beside the current one.

    ``fork`` runs its body there, after all work queued so far; ``join`` waits for it on the device.

        with side.fork():
            linear.shrink(x, batch)
        out = base_linear(x)
        side.join()
        linear.expand_(out, batch)

    Nothing waits on the host, and both may be captured in a CUDA graph. The caller keeps ``x`` alive until ``join``.
    On a device without streams both do nothing: the work is already in order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forked = torch.cuda.Event() if self._stream else None
        self._done = torch.cuda.Event() if self._stream else None

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Run the body's launches on the side stream."""
        if self._stream is None or self._forked is None or self._done is None:
            yield
            return
        if self._stream == (current := torch.cuda.current_stream(self._device)):
            self._stream = stream_beside(self._device, current)
        self._forked.record()
        self._stream.wait_event(self._forked)
        with torch.cuda.stream(self._stream):
            yield
            self._done.record()

    def join(self) -> None:
        """Make the current stream wait for the last fork."""
        if self._done is not None:
            self._done.wait()
