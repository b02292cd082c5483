"""Serving on a GPU that does not exist: what the host waits for, what is allocated, what nothing orders.

SGLang's tree and allocator, our pools, transfer, table, metadata and adder run on tensors that say they are on a GPU
(``blocklora_testing.gpu``). Of what they ask of it these tests find what a GPU would be slow or wrong with. Each kind
of fault is planted too, to show that it would be found. Kernels are not run here: their launches are taken as what they
read and write (``test/kernels`` runs them).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch
from blocklora_kernels import table
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.side_stream import SideStream
from blocklora_patches.cache import events
from blocklora_testing.gpu.device import CUDA, VirtualGPU
from blocklora_testing.gpu.serving import MAX_TOKENS, Serving
from blocklora_testing.gpu.trace import Buffer, Finding
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from sglang_blocklora.memory.loaded import Resident
from sglang_blocklora.memory.transfer import Transfer
from sglang_blocklora.memory.unified_pool import UnifiedPool

Plant = Callable[[pytest.MonkeyPatch], None]
# Bytes of an int64 for each slot of the largest adapter, or each token of a batch: all that may be allocated.
SLOT_NUMBERS = 8 * MAX_TOKENS


@dataclass
class Run:
    """What came of it, from when the server had warmed up."""

    serving: Serving
    findings: list[Finding]
    allocated: list[Buffer]
    left_out: int

    def of(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]

    @property
    def waits(self) -> list[Finding]:
        """Where the host waited at a line of ours; those of the driver of these tests are its own business."""
        return [finding for finding in self.of("wait") if finding.line != "not ours"]

    @property
    def large(self) -> list[str]:
        """What was allocated at a line of ours that is more than slot numbers; SGLang's own is below some."""
        ours = [one for one in self.allocated if not one.where.startswith(("[", "not ours"))]
        return [f"{one.size_bytes} bytes: {one.where}" for one in ours if one.size_bytes > SLOT_NUMBERS]


def run(lost: Collection[str] = (), plant: Plant | None = None, steps: int = 80, **options) -> Run:
    """Serve, with planted faults if any; it is warm once adapters are loaded and each size of a batch has run."""
    gpu = VirtualGPU(lost)
    with pytest.MonkeyPatch.context() as patch, gpu.on():
        serving = Serving(gpu, patch, **options)
        if plant is not None:
            plant(patch)
        names = [serving.load(contents) for contents in range(6)]
        serving.run(10, names)
        gpu.trace.findings.clear()
        allocated = len(gpu.allocations)
        serving.run(steps, names)
        assert serving.ended > steps / 2, "hardly anything ran"
        assert serving.pool._transfer._count > 5, "hardly anything was copied"
        return Run(serving, list(gpu.trace.findings), gpu.allocations[allocated:], gpu.streams.left_out)


SERVERS = [
    pytest.param({}, id="unified"),
    pytest.param({"static": True}, id="static"),
    pytest.param({"overlap": "stream", "seed": 1}, id="shrink beside the GEMM"),
    pytest.param({"ahead": 2, "seed": 2}, id="two passes ahead"),
    pytest.param({"page": 16, "slots": 320, "seed": 3}, id="pages"),
    pytest.param({"events": True, "seed": 4}, id="KV events"),
]


@pytest.mark.parametrize("options", SERVERS)
def test_nothing_is_out_of_order_waited_for_or_allocated(options) -> None:
    """With adapters that are evicted, unloaded under running requests, flushed, and brought in for nobody."""
    done = run(**options)
    assert not done.of("race")
    assert not done.of("freed")
    assert not done.waits
    assert not done.large
    assert (done.serving.events > 0) == ("events" in options)


def test_what_is_kept_of_resident_adapters_is_their_slot_numbers() -> None:
    gpu = VirtualGPU()
    with pytest.MonkeyPatch.context() as patch, gpu.on():
        serving = Serving(gpu, patch, slots=400)
        names = [serving.load(contents) for contents in range(6)]
        with torch.cuda.stream(serving.schedule):
            assert serving.pool.bring_in(names[:3])
            serving.pool.begin_step(names[:3])
            before = {buffer.number for buffer in gpu.live()}
            assert serving.pool.bring_in(names[3:])
            serving.pool.begin_step(names[3:])
        kept = [buffer for buffer in gpu.live() if buffer.number not in before and "reserve" not in buffer.where]
        ours = sum(buffer.size_bytes for buffer in kept if not buffer.where.startswith("["))
        assert ours == 8 * sum(len(serving.cache.slots_of(name)) for name in names[3:])


# What is left out, by its line -> the server that must show it.
LOST = {
    "self._rows.wait_stream(self._forward)": {},
    "self._rows.wait_stream(current)": {},
    "self._link.wait_event(self._emptied[part])": {},
    "self._rows.wait_event(self._filled[part])": {},
    "self._forward.wait_event(done)": {},
    "self._copied[self._turn].synchronize()": {"ahead": 2},
    "self._stream.wait_event(self._forked)": {"overlap": "stream"},
    "self._done.wait()": {"overlap": "stream"},
    "self._done.synchronize()": {"events": True},
}


@pytest.mark.parametrize("line", LOST)
def test_a_lost_wait_is_found(line: str) -> None:
    done = run([line], **LOST[line])
    assert done.left_out, "the line is gone"
    assert done.of("race")


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("slots.record_stream(self._rows)", {}),
        ("slots.record_stream(torch.cuda.current_stream(slots.device))", {"static": True}),
    ],
)
def test_memory_that_is_given_away_under_a_stream_is_found(line: str, options: dict[str, bool]) -> None:
    done = run([line], steps=200, **options)
    assert done.left_out, "the line is gone"
    assert done.of("freed")


@pytest.mark.parametrize("forgets", [True, False])
def test_slots_that_are_kv_before_the_adapter_was_written_to_them(forgets: bool) -> None:
    """It was brought in for a request that was not admitted, and evicted before any pass waited for its rows."""
    gpu = VirtualGPU()
    with pytest.MonkeyPatch.context() as patch, gpu.on():
        serving = Serving(gpu, patch, slots=60)
        name = serving.load(0)
        if not forgets:
            patch.setattr(Transfer, "forget", lambda self, owner: None)
        with torch.cuda.stream(serving.schedule):
            assert serving.pool.bring_in([name])
            serving.cache.evict(EvictParams(num_tokens=60))
        serving.step([(None, list(range(58)), 1)])
        serving.idle()
        assert any(finding.kind == "race" for finding in gpu.trace.findings) is not forgets


def one_host_buffer(patch: pytest.MonkeyPatch) -> None:
    """The next step's metadata are written over those that are still to be copied."""
    original = BatchMetadata._next_host

    def next_host(self: BatchMetadata) -> torch.Tensor:
        self._hosts = [self._hosts[0]] * len(self._hosts)
        return original(self)

    patch.setattr(BatchMetadata, "_next_host", next_host)


def test_a_buffer_that_is_written_before_it_was_copied_is_found() -> None:
    assert run(["self._copied[self._turn].synchronize()"], one_host_buffer).of("race")


def slots_on_the_host(patch: pytest.MonkeyPatch) -> None:
    def note_rows(self: UnifiedPool, key: str, adapter, slots: torch.Tensor) -> None:
        slots.cpu()
        self.resident[key] = Resident(adapter, slots)

    patch.setattr(UnifiedPool, "_note_rows", note_rows)


def pageable_entries(patch: pytest.MonkeyPatch) -> None:
    original = table.AdapterTable.write
    patch.setattr(table.AdapterTable, "write", lambda self, a, slots, entry: original(self, a, slots, entry.clone()))


def blocking_entries(patch: pytest.MonkeyPatch) -> None:
    original = table.AdapterTable.write

    def write(self: table.AdapterTable, adapter: int, slots: torch.Tensor, entry: torch.Tensor) -> None:
        original(self, adapter, slots, entry)
        self._entries[adapter].copy_(entry)

    patch.setattr(table.AdapterTable, "write", write)


def asks_for_a_value(patch: pytest.MonkeyPatch) -> None:
    original = table.AdapterTable.write

    def write(self: table.AdapterTable, adapter: int, slots: torch.Tensor, entry: torch.Tensor) -> None:
        original(self, adapter, slots, entry)
        self.first_slots[adapter] = int(slots[0])

    patch.setattr(table.AdapterTable, "write", write)


def events_from_the_device(patch: pytest.MonkeyPatch) -> None:
    def told_at_once(self: events.HostCopy, slots: torch.Tensor) -> None:
        self._done, self._slots = None, slots

    patch.setattr(events.HostCopy, "__init__", told_at_once)


def pageable_images(patch: pytest.MonkeyPatch) -> None:
    original = Transfer.copy
    patch.setattr(Transfer, "copy", lambda self, owner, slots, image: original(self, owner, slots, image.clone()))


@pytest.mark.parametrize(
    "plant",
    [
        slots_on_the_host,
        pageable_entries,
        blocking_entries,
        asks_for_a_value,
        pageable_images,
        events_from_the_device,
    ],
)
def test_what_the_host_waits_for_is_found(plant: Plant) -> None:
    assert run(plant=plant, events=plant is events_from_the_device).waits


def whole_image_staged(patch: pytest.MonkeyPatch) -> None:
    original = Transfer.copy

    def copy(self: Transfer, owner: str, slots: torch.Tensor, image: torch.Tensor) -> None:
        image.to(slots.device, non_blocking=True)
        original(self, owner, slots, image)

    patch.setattr(Transfer, "copy", copy)


def metadata_that_grow(patch: pytest.MonkeyPatch) -> None:
    original = BatchMetadata.update

    def update(self: BatchMetadata, *arguments, **options) -> None:
        torch.empty(SLOT_NUMBERS + 1, dtype=torch.uint8, device="cuda")
        original(self, *arguments, **options)

    patch.setattr(BatchMetadata, "update", update)


@pytest.mark.parametrize("plant", [whole_image_staged, metadata_that_grow])
def test_memory_that_is_taken_while_serving_is_found(plant: Plant) -> None:
    assert run(plant=plant).large


def test_streams_that_torch_gave_to_others_too_are_given_up() -> None:
    """It hands out the same 32 in turn: nothing would overlap with the pass that has one of ours."""
    gpu = VirtualGPU()
    with pytest.MonkeyPatch.context() as patch, gpu.on():
        serving = Serving(gpu, patch)
        ours = serving.pool._transfer
        serving.forward = gpu.streams.Stream(number=ours._rows.number)
        names = [serving.load(contents) for contents in range(6)]
        serving.run(40, names)
        assert len({stream.number for stream in (serving.forward, serving.schedule, ours._rows, ours._link)}) == 4
        assert not [finding for finding in gpu.trace.findings if finding.kind == "race"]
        side = SideStream(CUDA)
        with torch.cuda.stream(gpu.streams.Stream(number=side._stream.number)):
            with side.fork():
                beside = torch.cuda.current_stream()
            assert beside != torch.cuda.current_stream()
