"""Sums a tensor over the TP ranks of one machine in memory that they share, for SGLang's CPU engine.

gloo takes one to two milliseconds for a sum over loopback where ranks have a core each, most of a small model's step;
this takes 10 to 30 microseconds. A rank writes its part, then the number of the sum; it waits until all numbers are
there, and adds the parts up in the order of the ranks, so that all find the same bits. Two parts for each rank take
turns: whoever writes sum n + 2 has seen everybody's n + 1, which they wrote when they had read n.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import time
from collections.abc import Sequence

import torch
from torch import distributed

PART_BYTES = 2**20  # of a rank; larger tensors go over gloo
LINE = 64  # bytes between two ranks' numbers: a cache line
LOOKS, YIELDS = 100, 50  # until a rank that waits lets others have its core; until it sleeps between two looks
PAUSE_S, PAUSES = 5e-5, 1000  # of a sleep; until it looks whether the other one has ended
LIMIT_S = 1800.0  # of sleep: then it gives up


def is_usable() -> bool:
    """Whether ranks of this machine can use it: on Linux, where others see stores in their order, as on x86-64."""
    return platform.machine() == "x86_64" and hasattr(os, "pidfd_open")


class SharedSum:
    """The shared memory of one group of ranks, as one of them has it.

    Its pages have no name in a file system: they go when the last rank ends, however it ends.
    """

    def __init__(self, memory: mmap.mmap, rank: int, processes: Sequence[int]) -> None:
        """``processes``: ids of the ranks. ``memory``: ``size_of`` so many, zeros at first, kept while this lives."""
        self._rank, self._count, size = rank, 0, len(processes)
        self._ends = [select.poll() for _ in processes]
        for ends, process in zip(self._ends, processes, strict=True):
            ends.register(os.pidfd_open(process), select.POLLIN)  # readable once it has ended
        numbers = memoryview(memory)[: LINE * size].cast("q")
        self._numbers = [numbers[LINE // 8 * other :] for other in range(size)]
        self._parts = torch.frombuffer(memory, dtype=torch.uint8, offset=LINE * size).view(2, size, PART_BYTES)
        self._views: dict[tuple[int, torch.dtype, int], torch.Tensor] = {}

    @staticmethod
    def size_of(size: int) -> int:
        """Bytes for ``size`` ranks."""
        return LINE * size + 2 * size * PART_BYTES

    @staticmethod
    def of(group: distributed.ProcessGroup) -> SharedSum | None:
        """Set it up; collective over ``group``, of gloo. None on all where a rank cannot see the first one's memory."""
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        length, file, told = SharedSum.size_of(size), None, [("", b"")]
        if rank == 0:
            secret = secrets.token_bytes(16)
            file = os.memfd_create("sglang-blocklora sum")
            os.ftruncate(file, length)
            os.pwrite(file, secret, 0)
            told = [(f"/proc/{os.getpid()}/fd/{file}", secret)]
        distributed.broadcast_object_list(told, group=group, group_src=0)
        memory = _map(*told[0], length)
        processes = [0] * size
        distributed.all_gather_object(processes, os.getpid() if memory is not None else 0, group=group)
        if file is not None:
            os.pwrite(file, bytes(LINE), 0)  # numbers begin at zero
            os.close(file)
        distributed.barrier(group)
        return SharedSum(memory, rank, processes) if memory is not None and all(processes) else None

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether ``all_reduce_`` can sum it; equal on all ranks for tensors of equal shape, layout and dtype."""
        return tensor.is_contiguous() and tensor.is_floating_point() and 0 < tensor.nbytes <= PART_BYTES

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor``, one that it ``takes``, by the sum of all ranks' in place.

        All ranks call it with the same shape and dtype. ``RuntimeError`` naming a rank that has ended, ``TimeoutError``
        one that does not call it for half an hour.
        """
        self._count += 1
        key = (self._count % 2, tensor.dtype, tensor.nbytes)
        parts = self._views.get(key)
        if parts is None:
            parts = self._views[key] = self._parts[key[0], :, : tensor.nbytes].view(tensor.dtype)
        flat = tensor.view(-1)
        parts[self._rank].copy_(flat)
        self._numbers[self._rank][0] = self._count
        for rank in range(len(self._numbers)):
            self._wait_for(rank)
        torch.sum(parts, 0, out=flat)

    def _wait_for(self, rank: int) -> None:
        number, looks = self._numbers[rank], 0
        while number[0] < self._count:
            looks += 1
            if looks > LOOKS + YIELDS:
                time.sleep(PAUSE_S)
                if looks % PAUSES == 0:
                    self._check(rank, slept_s=looks * PAUSE_S)
            elif looks > LOOKS:
                os.sched_yield()

    def _check(self, rank: int, slept_s: float) -> None:
        if self._ends[rank].poll(0) and self._numbers[rank][0] < self._count:
            raise RuntimeError(f"TP rank {rank} has ended before sum {self._count}")
        if slept_s > LIMIT_S:
            raise TimeoutError(f"TP rank {rank} has not come to sum {self._count} for {LIMIT_S:g} s")


def _map(path: str, secret: bytes, length: int) -> mmap.mmap | None:
    """The memory that begins with ``secret`` and that another rank has open under ``path``; None on other machines."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        same = os.fstat(file).st_size == length and os.pread(file, len(secret), 0) == secret
        return mmap.mmap(file, length) if same else None
    finally:
        os.close(file)
