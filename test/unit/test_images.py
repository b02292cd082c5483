"""Images below the arena: which are in host memory, what is read again, and what becomes of a read that fails."""

from __future__ import annotations

import pytest
import torch
from blocklora_testing.ranks import Ranks
from blocklora_testing.tiers import Disk, numbered
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import given
from hypothesis import strategies as st
from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.host_tier import HostTier
from sglang_blocklora.memory.images import ImageStore
from sglang_blocklora.memory.loaded import LoadedAdapter

KEYS = "abcde"
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "peek", "remove"]), st.sampled_from(KEYS), st.integers(0, 12)), max_size=60
)


@given(budget=st.integers(0, 20), operations=OPERATIONS)
def test_the_host_tier_keeps_the_most_recently_used_that_fit(budget: int, operations) -> None:
    """Against a plain list of (key, size), the least recently used first."""
    tier: HostTier[int] = HostTier(budget)
    model: list[tuple[str, int]] = []
    for step, (operation, key, size) in enumerate(operations):
        known = next((one for one in model if one[0] == key), None)
        if operation == "put":
            model = [one for one in model if one[0] != key]
            kept = [*model, (key, size)] if size <= budget else model
            while sum(own for _, own in kept) > budget:
                kept = kept[1:]
            assert tier.put(key, size, step) == [name for name, _ in model[: len(model) - len(kept) + (size <= budget)]]
            model = kept
        elif operation == "get":
            assert (tier.get(key) is not None) == (known is not None)
            if known:
                model = [*(one for one in model if one != known), known]
        elif operation == "peek":
            assert (tier.peek(key) is not None) == (known is not None)
        else:
            tier.remove(key)
            model = [one for one in model if one[0] != key]
        assert [name for name in KEYS if name in tier] == sorted(name for name, _ in model)
        assert tier.used_bytes == sum(own for _, own in model) <= budget


class Stores:
    """An image store on each of two TP ranks; adapters of 10 slots of a byte each."""

    def __init__(self, budget_bytes: int) -> None:
        self.disks = [Disk(), Disk()]
        self.ranks = Ranks(lambda rank, reads: ImageStore(budget_bytes, 1, self.disks[rank].read, reads, NO_LOG))
        self.stores = self.ranks.objects

    def add(self, count: int) -> None:
        for number in range(count):
            for store in self.stores:
                store.add(f"k{number}", *numbered(number, 10))

    def ask(self, number: int) -> float | None:
        """The number in every element of the image, or None where it is not at hand now."""

        def ask(store: ImageStore) -> float | None:
            image = store.get(f"k{number}", numbered(number, 10)[0])
            if image is None:
                return None
            assert (image == image.flatten()[0]).all()
            return float(image.flatten()[0])

        return self.ranks.call(ask)

    def arrive(self) -> None:
        self.ranks.arrive(lambda store, decision: store.arrived(decision))

    def get(self, number: int) -> float | None:
        """As ``ask``, once it has been read."""
        found = self.ask(number)
        if found is not None:
            return found
        self.arrive()
        return self.ask(number)

    def prefetch(self, *numbers: int) -> None:
        self.ranks.call(lambda store: store.prefetch([(f"k{number}", numbered(number, 10)[0]) for number in numbers]))

    def take_failures(self) -> dict[str, str]:
        return self.ranks.call(lambda store: store.take_failures())

    def held(self) -> list[str]:
        return self.ranks.call(lambda store: [f"k{n}" for n in range(9) if f"k{n}" in store.host])


NO_LOG = DecisionLog(None, 0)


def test_without_a_host_budget_every_image_is_read_again() -> None:
    stores = Stores(0)
    stores.add(2)
    assert [stores.get(n) for n in (0, 1, 0)] == [0, 1, 0]
    stores.prefetch(0, 1)
    assert [disk.reads for disk in stores.disks] == [["a0", "a1", "a0"]] * 2
    assert stores.stores[0].load_counts.of("k0").disk_reads == 2


def test_an_image_that_is_not_at_hand_is_read_once_and_nobody_waits() -> None:
    stores = Stores(10)
    stores.add(2)
    assert [stores.ask(0), stores.ask(0), stores.ask(1)] == [None, None, 1]
    assert [disk.reads for disk in stores.disks] == [["a0"]] * 2
    assert stores.ranks.call(lambda store: (store.is_being_read("k0"), store.in_host_memory("k0"))) == (True, False)
    stores.arrive()
    assert stores.ranks.call(lambda store: (store.is_being_read("k0"), store.in_host_memory("k0"))) == (False, True)
    assert stores.ask(0) == 0


def test_an_image_without_room_in_host_memory_is_kept_for_whom_it_was_read_and_no_longer() -> None:
    stores = Stores(0)
    stores.add(1)
    for wanted, kept in (({"k0"}, True), (set(), False)):
        assert stores.ask(0) is None
        stores.arrive()
        stores.ranks.call(lambda store, wanted=wanted: store.drop_unwanted(wanted))
        assert stores.ranks.call(lambda store: store.in_host_memory("k0")) == kept
        assert stores.ask(0) == (0 if kept else None)


def test_a_read_that_ends_after_its_adapter_was_unloaded_leaves_nothing() -> None:
    stores = Stores(20)
    stores.add(3)
    assert stores.ask(0) is None
    stores.ranks.call(lambda store: store.remove("k0"))
    stores.arrive()
    assert stores.ranks.call(lambda store: store.in_host_memory("k0")) is False
    assert stores.take_failures() == {}


@pytest.mark.parametrize("state", ["gone", "other"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_read_is_a_failure_on_all_and_of_one_adapter(rank: int, state: str) -> None:
    stores = Stores(20)
    stores.add(3)
    stores.disks[rank].states["a0"] = state
    assert stores.get(0) is None
    assert stores.get(0) is None
    assert len(stores.disks[0].reads) == 1, "asked again before the requests were answered"
    assert [stores.get(n) for n in (1, 2)] == [1, 2]
    (message,) = stores.take_failures().values()
    assert "'a0'" in message
    assert "no folder" in message if state == "gone" else "other contents in /p" in message
    assert stores.get(0) is None, "still broken"
    assert stores.take_failures() == {"k0": message} == stores.stores[0].last_errors
    stores.disks[rank].states.clear()
    assert stores.get(0) == 0
    assert stores.take_failures() == stores.stores[0].last_errors == {}


def test_what_is_in_host_memory_needs_no_folder() -> None:
    stores = Stores(20)
    stores.add(2)
    for disk in stores.disks:
        disk.states = {"a0": "gone", "a1": "gone"}
    assert [stores.get(n) for n in (0, 1)] == [0, 1]
    assert stores.disks[0].reads == []


def test_images_wanted_soon_are_read_ahead_within_the_budget_and_most_urgent_first() -> None:
    stores = Stores(20)
    stores.add(5)
    assert stores.held() == ["k3", "k4"]
    stores.prefetch(4, 0, 1, 2)
    assert [disk.reads for disk in stores.disks] == [["a0"]] * 2, "what is beyond the budget is not begun"
    stores.arrive()
    assert stores.held() == ["k0", "k4"], "what is wanted stays"
    assert [stores.ask(0), stores.ask(4)] == [0, 4]


def test_the_bytes_of_an_adapter_are_checked_when_it_is_read_again(tmp_path) -> None:
    """Real files: the same bytes serve, another weight or another scaling in the same folder does not."""
    model = ToyModel()
    spec = model.spec(0, 2, torch.float32)
    write_adapter(tmp_path, model, seed=1)
    report, first = read_adapter("mine", str(tmp_path), spec, 64, None)
    known = LoadedAdapter(
        name="mine",
        path=str(tmp_path),
        shard=first.shard,
        slots=report.slots,
        pinned=False,
        content_hash=report.content_hash,
        image_digest=first.image_digest,
    )
    assert known.content_hash == content_hash(tmp_path)

    def read_again(adapter: LoadedAdapter):
        return read_adapter(adapter.name, adapter.path, spec, 64, None, hash_contents=False)

    ranks = Ranks(lambda rank, reads: ImageStore(0, 1, read_again, reads, NO_LOG))
    store = ranks.objects[0]

    def get() -> tuple[torch.Tensor | None, ...]:
        ranks.call(lambda store: store.get("k", known) is None)
        ranks.arrive(lambda store, decision: store.arrived(decision))
        ranks.call(lambda store: store.in_host_memory("k"))
        return store.get("k", known), ranks.objects[1].get("k", known)

    for image in get():
        assert torch.equal(image, first.image)
    for changed in ({"seed": 2}, {"seed": 1, "lora_alpha": 17}, {"seed": 1, "rank": 5}):
        write_adapter(tmp_path, model, **changed)
        assert get() == (None, None)
        (message,) = ranks.call(lambda store: store.take_failures()).values()
        assert f"other contents in {tmp_path}" in message
        assert known.content_hash in message
    write_adapter(tmp_path, model, seed=1)
    assert None not in get()
