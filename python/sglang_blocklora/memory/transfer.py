"""Copies images to the arena, beside the forward pass and in order with it on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from blocklora_kernels.scatter import RowScatter
from blocklora_kernels.side_stream import stream_beside

# Device memory through which images go, in parts of which some are filled while others are written to rows. All of
# them together go ahead of a running pass: an adapter of rank 16 for Llama-3.1-8B at TP 8 takes 10 MiB.
STAGING_PARTS = 4
PART_BYTES = 16 * 2**20


class Rows(Protocol):
    """An arena, to which images are written."""

    @property
    def planes(self) -> Sequence[Sequence[torch.Tensor]]: ...
    def write(self, slots: torch.Tensor, image: torch.Tensor) -> None: ...


class Transfer:
    """Copies on streams of its own.

    ``copy`` copies; ``join``, called where a forward pass begins, makes that wait for what it uses.

    With the overlap schedule a forward pass may still be running whose requests have ended: it reads or writes slots
    that are free again for the host. So rows are written after all work that is queued on the stream where ``join`` was
    called last; copies from the host go on before, as far as ``STAGING_PARTS`` go. The host never waits and never asks
    for an event. On a device without streams ``copy`` copies at once.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """``device`` is the arena's; None: the CPU."""
        self._device = device or torch.device("cpu")
        self._on_gpu = self._device.type == "cuda"
        self._arena: Rows | None = None
        self._forward: torch.cuda.Stream | None = None
        # Copies that no pass has waited for yet, by owner, in order: what number a copy has, and when it is done.
        self._copies: dict[str, tuple[int, torch.cuda.Event]] = {}
        self._ownerless: tuple[int, torch.cuda.Event] | None = None  # the last one whose slots may be another's
        self._count = 0

    def bind(self, arena: Rows) -> None:
        """Set the arena, take the memory that copies go through, and compile what they need. Once, at the start."""
        self._arena = arena
        if not self._on_gpu:
            return
        self._link = stream_beside(self._device)  # from the host to the staging parts
        self._rows = stream_beside(self._device, self._link)  # from those to the rows, in the order of copies
        self._parts = torch.empty(STAGING_PARTS, PART_BYTES, dtype=torch.uint8, device=self._device)
        self._filled = [torch.cuda.Event() for _ in range(STAGING_PARTS)]
        self._emptied = [torch.cuda.Event() for _ in range(STAGING_PARTS)]
        self._turn = 0
        plane = arena.planes[0][0]
        self._scatter = RowScatter(arena.planes)
        self._scatter.compile(
            torch.zeros(1, dtype=torch.int64, device=self._device),
            self._parts[0].view(plane.dtype)[: plane.shape[1]].view(1, -1),
        )

    def copy(self, owner: str, slots: torch.Tensor, image: torch.Tensor) -> None:
        """Write an image [layers, 2, S, W] from host memory to ``slots[:S]``, int64 on the arena's device.

        owner  whose the slots are until ``forget``; a pass that ``join``s for it finds the rows written
        """
        if self._arena is None:
            raise RuntimeError("nothing can be copied before the arena exists")
        if not self._on_gpu:
            self._arena.write(slots, image)
            return
        current = torch.cuda.current_stream(self._device)
        self._keep_apart_from(current)
        self._rows.wait_stream(current)  # where the allocator chose the slots
        if self._forward is not None:
            self._rows.wait_stream(self._forward)
        slots.record_stream(self._rows)
        slots_each, width = image.shape[2:]
        rows = image.view(-1, width)
        most = PART_BYTES // (width * image.element_size())
        for first in range(0, len(rows), most):
            self._copy_part(slots, rows[first : first + most], first, slots_each)
        done = torch.cuda.Event()
        done.record(self._rows)
        self._count += 1
        self._copies[owner] = (self._count, done)

    def forget(self, owner: str) -> None:
        """Its slots are another's from now on: the next pass waits for their copy whomever it is for."""
        copy = self._copies.pop(owner, None)
        if copy is not None and (self._ownerless is None or copy[0] > self._ownerless[0]):
            self._ownerless = copy

    def join(self, owners: Iterable[str]) -> None:
        """Make the current stream, on which a forward pass is about to be queued, wait for these owners' copies."""
        if not self._on_gpu:
            return
        self._forward = torch.cuda.current_stream(self._device)
        self._keep_apart_from(self._forward)
        wanted = [self._copies[owner] for owner in owners if owner in self._copies]
        wanted += [self._ownerless] if self._ownerless is not None else []
        if not wanted:
            return
        last, done = max(wanted, key=lambda copy: copy[0])
        self._forward.wait_event(done)  # and so for all copies before it, which are on the same stream
        self._copies = {owner: copy for owner, copy in self._copies.items() if copy[0] > last}
        self._ownerless = None

    def _copy_part(self, slots: torch.Tensor, rows: torch.Tensor, first: int, slots_each: int) -> None:
        part = self._turn
        self._turn = (part + 1) % STAGING_PARTS
        staged = self._parts[part].view(rows.dtype)[: rows.numel()].view(rows.shape)
        with torch.cuda.stream(self._link):
            self._link.wait_event(self._emptied[part])
            staged.copy_(rows, non_blocking=True)
            self._filled[part].record(self._link)
        with torch.cuda.stream(self._rows):
            self._rows.wait_event(self._filled[part])
            self._scatter.write(slots, staged, first, slots_each)
            self._emptied[part].record(self._rows)

    def _keep_apart_from(self, theirs: torch.cuda.Stream) -> None:
        """Take other streams where torch gave the scheduler or the forward pass one of ours: nothing would overlap."""
        if theirs in (self._link, self._rows):
            before = (self._link, self._rows)
            self._link = stream_beside(theirs.device, theirs)
            self._rows = stream_beside(theirs.device, theirs, self._link)
            for ours in (self._link, self._rows):
                for stream in before:
                    ours.wait_stream(stream)
