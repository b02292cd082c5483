"""Checks what TP ranks exchange: an all-reduce, and the store through which they tell each other of reads."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import _get_default_store
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from sglang_blocklora.adapters.loading import Report
from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped
from sglang_blocklora.memory.reads import StoreBoard

CPU_RANKS = 2
PATIENCE = timedelta(seconds=60)  # of a collective; the first one of nccl takes seconds
ELEMENTS = 4096
ADVICE = (
    "Run it with NCCL_DEBUG=INFO (without GPUs TORCH_DISTRIBUTED_DEBUG=DETAIL), which tells what the ranks lack: "
    "links between devices, room in /dev/shm, TCP on 127.0.0.1."
)


def check(asked: Asked) -> Iterator[Finding]:
    """One group of all devices, or of two processes without a GPU."""
    if not torch.cuda.is_available():
        yield from exchanged("gloo", CPU_RANKS)
    elif torch.cuda.device_count() == 1:
        yield skipped("TP group", "there is one device: nothing is exchanged")
    else:
        yield from exchanged("nccl", torch.cuda.device_count())


def exchanged(backend: str, size: int) -> Iterator[Finding]:
    """Start ``size`` ranks, and judge what each has received."""
    what = f"TP group, {backend}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    received = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        spawn(rank, (size, backend, port, received), nprocs=size)
    except (ProcessRaisedException, ProcessExitedException) as error:
        last = str(error).strip().rpartition("\n")[2]
        yield fault(what, f"{size} ranks: {last}", ADVICE)
        return
    yield from judge(what, [received.get() for _ in range(size)])


def rank(number: int, size: int, backend: str, port: int, received: Any) -> None:
    """One TP rank. Puts into ``received``: its number, what the all-reduce gave, and what rank 0 read in the store."""
    device = torch.device(f"cuda:{number}" if backend == "nccl" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group(backend, address, timeout=PATIENCE, rank=number, world_size=size)
    value = torch.full((ELEMENTS,), float(number + 1), device=device)
    distributed.all_reduce(value)
    board = StoreBoard(_get_default_store(), number, size)
    board.post(1, Report(slots=number))
    distributed.barrier()
    reports = board.collect(1) if number == 0 else []
    sums = sorted(set(value.tolist()))
    received.put((number, sums, None if reports is None else [report.slots for report in reports]))
    distributed.barrier()  # the store lives in rank 0
    distributed.destroy_process_group()


def judge(what: str, received: list[tuple[int, list[float], list[int] | None]]) -> Iterator[Finding]:
    """The verdict on what each of the ranks has received."""
    size = len(received)
    expected = size * (size + 1) / 2
    wrong = {number: sums for number, sums, _ in received if sums != [expected]}
    if wrong:
        found = f"{size} ranks: expected {expected:g}, got {wrong} (rank: values)"
        yield fault(what, found, "Try NCCL_P2P_DISABLE=1; if that helps, look after the devices' links (IOMMU, ACS).")
    else:
        yield ok(what, f"{size} ranks added up {ELEMENTS} numbers")
    told = next(slots for number, _, slots in received if number == 0)
    if told == list(range(size)):
        yield ok("TP group, store", f"rank 0 read what {size} ranks had left")
    else:
        found = f"rank 0 expected {list(range(size))}, read {told}"
        yield fault("TP group, store", found, "Let the ranks reach each other over TCP on 127.0.0.1.")
