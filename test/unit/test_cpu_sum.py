"""Sums over ranks in shared memory: real processes, against float64."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from sglang_blocklora import cpu_sum
from sglang_blocklora.cpu_sum import PART_BYTES, SharedSum
from torch import distributed, multiprocessing

pytestmark = pytest.mark.skipif(not cpu_sum.is_usable(), reason="needs Linux on x86-64")
SHAPES = [(1,), (3, 5), (64, 512), (PART_BYTES // 8,)]


def part(rank: int, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_ranks(size: int, work) -> None:
    """Run ``work(rank, size)`` in so many processes of one gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(start, (size, f"{folder}/store", work), size, start_method="fork")


def start(rank: int, size: int, store: str, work) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    work(rank, size)
    distributed.barrier()
    distributed.destroy_process_group()


def add_many(rank: int, size: int) -> None:
    shared = SharedSum.of(distributed.group.WORLD)
    assert shared is not None
    for number in range(200):
        shape, dtype = SHAPES[number % 4], (torch.float32, torch.bfloat16, torch.float64)[number % 3]
        own = part(rank, number, shape, dtype)
        assert shared.takes(own)
        shared.all_reduce_(own)
        parts = torch.stack([part(other, number, shape, dtype).double() for other in range(size)])
        error = (own.double() - parts.sum(0)).abs() / parts.abs().sum(0)
        assert error.max() <= size * torch.finfo(dtype).eps, number
        everybodys = [torch.empty_like(own) for _ in range(size)]
        distributed.all_gather(everybodys, own)
        assert all(torch.equal(other, own) for other in everybodys), "ranks must find the same bits"


def add_as_gloo(rank: int, size: int) -> None:
    shared = SharedSum.of(distributed.group.WORLD)
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        own = part(rank, number, (64, 512), dtype)
        other = own.clone()
        distributed.all_reduce(other)
        shared.all_reduce_(own)
        assert torch.equal(own, other)


def see_nothing(rank: int, size: int) -> None:
    if rank == 1:
        cpu_sum._map = lambda *_: None  # as on another machine
    assert SharedSum.of(distributed.group.WORLD) is None


def wait_in_vain(rank: int, size: int) -> None:
    shared = SharedSum.of(distributed.group.WORLD)
    cpu_sum.LIMIT_S = 0.1
    if rank == 0:
        with pytest.raises(TimeoutError, match="TP rank 1 has not come to sum 1"):
            shared.all_reduce_(torch.ones(2))


def outlive_another(rank: int, size: int) -> None:
    shared = SharedSum.of(distributed.group.WORLD)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match="TP rank 1 has ended before sum 1"):
        shared.all_reduce_(torch.ones(2))
    os._exit(0)  # without the barrier at the end


def leave_no_name(rank: int, size: int) -> None:
    shared = SharedSum.of(distributed.group.WORLD)
    assert shared is not None
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "sglang-blocklora sum" in line]
    assert [line.endswith("(deleted)") for line in mapped] == [True]


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_right_and_the_same_on_all_ranks(size: int) -> None:
    in_ranks(size, add_many)


def test_two_ranks_find_what_gloo_finds() -> None:
    in_ranks(2, add_as_gloo)


def test_ranks_that_share_no_memory_have_none() -> None:
    in_ranks(2, see_nothing)


def test_a_rank_that_does_not_come_is_named() -> None:
    in_ranks(2, wait_in_vain)


def test_a_rank_that_has_ended_is_named() -> None:
    in_ranks(2, outlive_another)


def test_what_it_takes() -> None:
    take = SharedSum.takes
    ones = torch.ones(8, 8)
    assert take(None, ones)
    assert not take(None, ones.t()[1:])
    assert not take(None, ones.int())
    assert not take(None, ones[:0])
    assert not take(None, torch.ones(PART_BYTES // 4 + 1))


def test_its_memory_has_no_name() -> None:
    in_ranks(2, leave_no_name)
