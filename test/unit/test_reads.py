"""Reads beside the steps: real threads, a real key-value store, two TP ranks, storage that hangs."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from sglang_blocklora.adapters.loading import Found, LocalShard, Report
from sglang_blocklora.adapters.shard import AdapterShard
from sglang_blocklora.memory.reads import READS_AT_ONCE, Board, Decision, LocalBoard, Reads, StoreBoard
from torch.distributed import HashStore, TCPStore

LONG_S = 60.0  # nothing here takes so long unless it hangs


def found(number: int, slots: int = 3) -> Found:
    shard = AdapterShard(name="a", rank=1, nblocks=1, slots=slots, descriptors=(), scalings=(), entry=torch.empty(0))
    local = LocalShard(shard=shard, image=torch.full((1,), float(number)), image_digest=str(number))
    return Report(slots=slots, content_hash="same"), local


class Group:
    """TP ranks that read; ``step`` is what a server's step does: TP rank 0 tells, all ranks finish."""

    def __init__(self, size: int, timeout_s: float = LONG_S, store: object = None) -> None:
        store = store or HashStore()
        boards: list[Board] = [LocalBoard()] if size == 1 else [StoreBoard(store, r, size) for r in range(size)]
        self.ranks = [Reads(rank, board, timeout_s) for rank, board in enumerate(boards)]

    def start(self, *runs: Callable[[], Found], name: str = "mine", path: str = "/p") -> int:
        numbers = {rank.start(name, path, run) for rank, run in zip(self.ranks, runs, strict=True)}
        assert len(numbers) == 1
        return numbers.pop()

    def wait(self) -> list[Decision]:
        """TP rank 0's decisions, as a scheduler that sleeps gets them."""
        assert select.select([self.ranks[0].wake_fd], [], [], LONG_S)[0], "nothing was decided"
        decisions = self.ranks[0].decisions()
        assert decisions
        assert all(rank.decisions() == [] for rank in self.ranks[1:])
        return decisions

    def step(self) -> list[tuple[Decision, list[LocalShard | None]]]:
        return [(decision, [rank.finish(decision) for rank in self.ranks]) for decision in self.wait()]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Storage that answers when the test lets it, at the end at the latest."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_get_their_own_part_of_what_all_have_read(size: int) -> None:
    group = Group(size)
    number = group.start(*(lambda rank=rank: found(rank, slots=3 + rank) for rank in range(size)))
    ((decision, locals_),) = group.step()
    assert decision == Decision(number=number, report=Report(slots=2 + size, content_hash="same"))
    assert [float(local.image) for local in locals_ if local] == list(range(size))
    assert group.ranks[0].decisions() == []
    assert not select.select([group.ranks[0].wake_fd], [], [], 0)[0], "the scheduler would never sleep again"


def test_over_the_store_of_a_process_group() -> None:
    """Two clients of one server, as TP ranks are."""
    server = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LONG_S))
    client = TCPStore("127.0.0.1", server.port, None, is_master=False, timeout=timedelta(seconds=LONG_S))
    group = Group(1)
    group.ranks = [Reads(0, StoreBoard(server, 0, 2), LONG_S), Reads(1, StoreBoard(client, 1, 2), LONG_S)]
    keys = server.num_keys()
    group.start(lambda: found(0), lambda: found(1))
    ((_, locals_),) = group.step()
    assert [float(local.image) for local in locals_ if local] == [0, 1]
    assert server.num_keys() == keys, "reports stay in the store for ever"


def test_a_refusal_on_one_rank_is_one_on_all() -> None:
    group = Group(2)
    group.start(lambda: found(0), lambda: (Report(error="adapter 'mine': NaN"), None))
    ((decision, locals_),) = group.step()
    assert (decision.report.error, locals_) == ("adapter 'mine': NaN", [None, None])


def test_other_contents_on_another_rank_are_a_refusal() -> None:
    group = Group(2)
    group.start(lambda: found(0), lambda: (Report(slots=3, content_hash="other"), found(1)[1]))
    ((decision, locals_),) = group.step()
    assert "files in /p that changed while they were read" in (decision.report.error or "")
    assert locals_ == [None, None]


@pytest.mark.parametrize("slow", [0, 1])
def test_nobody_is_told_before_the_slowest_rank_has_read_and_others_go_on(slow: int, gate: threading.Event) -> None:
    group = Group(2)
    runs = [lambda: found(0), lambda: found(1)]
    waits = list(runs)
    waits[slow] = lambda: (gate.wait(LONG_S), runs[slow]())[1]
    first = group.start(*waits)
    second = group.start(*runs, name="quick", path="/q")
    assert [decision.number for decision, _ in group.step()] == [second]
    gate.set()
    ((decision, locals_),) = group.step()
    assert (decision.number, decision.report.error) == (first, None)
    assert None not in locals_


@pytest.mark.parametrize("hung", [0, 1])
def test_storage_that_hangs_is_given_up_and_costs_no_other_read(hung: int, gate: threading.Event) -> None:
    """More adapters hang than are read at once; then a sound one is read. A second try at a hung one is refused."""
    group = Group(2, timeout_s=0.2)
    runs = [lambda: found(0), lambda: found(1)]
    for i in range(READS_AT_ONCE + 1):
        waits = list(runs)
        waits[hung] = lambda: (gate.wait(LONG_S), runs[hung]())[1]
        group.start(*waits, path=f"/{i}")
    errors = []
    while len(errors) < READS_AT_ONCE + 1:
        errors += [decision.report.error or "" for decision, locals_ in group.step() if locals_ == [None, None]]
    assert all("'mine'" in error and "could not be read within 0.2 s" in error for error in errors)
    group.start(*runs, path="/0")
    ((decision, _),) = group.step()
    assert "an earlier read has not come back" in (decision.report.error or "")
    group.start(*runs, path="/sound")
    ((decision, locals_),) = group.step()
    assert decision.report.error is None
    assert None not in locals_
    gate.set()
    assert _eventually(lambda: group.ranks[hung]._stuck == set()), "a folder that is back stays refused"
    group.start(*runs, path="/0")
    ((decision, _),) = group.step()
    assert decision.report.error is None


def _eventually(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + LONG_S
    while not check() and time.monotonic() < end:
        time.sleep(0.005)
    return check()
