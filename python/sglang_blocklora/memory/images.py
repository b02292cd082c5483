"""Keeps images of loaded adapters in host memory, and has the others read again from their folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch

from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.loading import Found, Report
from sglang_blocklora.memory.counts import AdapterCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.durations import Durations
from sglang_blocklora.memory.host_tier import HostTier
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.reads import Decision, Reads

# Reads this TP rank's part of an adapter again; runs in another thread, and never raises.
ReadAgain = Callable[[LoadedAdapter], Found]


class ImageStore:
    """Gives the packed image of a loaded adapter: from the host tier, or from disk where it is not there.

    ``get`` never waits. Where an image is not at hand it has it read and gives None until ``arrived`` is told, on all
    TP ranks in the same step, that all of them have it. An image for which the host tier has no room is kept until it
    is asked for. ``failures`` holds the message for each adapter that could not be read, until ``take_failures``;
    ``last_errors`` holds it until the adapter is read.
    """

    def __init__(
        self,
        budget_bytes: int,
        slot_bytes: int,
        read_again: ReadAgain,
        reads: Reads,
        decisions: DecisionLog,
        *,
        pinned: bool = False,
    ) -> None:
        """Start with nothing in host memory.

        slot_bytes  bytes of one slot on a TP rank, over all layers and both planes
        pinned      whether ``read_again`` gives images in page-locked memory
        """
        self.host: HostTier[torch.Tensor] = HostTier(budget_bytes)
        self.load_counts = AdapterCounts()
        self.failures: dict[str, str] = {}
        self.last_errors: dict[str, str] = {}
        self._slot_bytes = slot_bytes
        self._pinned = pinned
        self._read_again = read_again
        self._reads = reads
        self._decisions = decisions
        self._reading: dict[str, int] = {}  # key -> number of its read
        self._wanted: dict[int, tuple[str, LoadedAdapter]] = {}  # number of a read -> for whom
        self._unkept: dict[str, torch.Tensor] = {}  # read, and larger than what the budget leaves

    @property
    def read_durations(self) -> Durations:
        """How long reads of adapters took, first ones among them."""
        return self._reads.durations

    def size_bytes(self, adapter: LoadedAdapter) -> int:
        """What an image costs in host memory: the same on every TP rank."""
        return image_bytes(adapter.slots, self._slot_bytes, self._pinned)

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        """Take the image [layers, 2, slots, W] of an adapter that was just loaded, as far as the budget goes."""
        self._keep(key, adapter, image)

    def remove(self, key: str) -> None:
        """Forget an adapter; a read of it that goes on is for nothing."""
        self.host.remove(key)
        self._unkept.pop(key, None)
        self._reading.pop(key, None)
        self.failures.pop(key, None)
        self.last_errors.pop(key, None)
        self.load_counts.forget(key)

    def in_host_memory(self, key: str) -> bool:
        """Whether the image is at hand."""
        return key in self.host or key in self._unkept

    def is_being_read(self, key: str) -> bool:
        """Whether the image will be at hand later, or will have failed."""
        return key in self._reading

    def get(self, key: str, adapter: LoadedAdapter) -> torch.Tensor | None:
        """The image, or None where it is being read, or could not be (``failures`` says why)."""
        image = self.host.get(key)
        if image is None:
            image = self._unkept.pop(key, None)
        if image is None and key not in self.failures:
            self._start(key, adapter)
        return image

    def prefetch(self, wanted: Sequence[tuple[str, LoadedAdapter]]) -> None:
        """Start to read the images that will be needed soon, most urgent first: as many as the budget holds together.

        ``wanted`` are uses: other images give way before them.
        """
        total_bytes = 0
        for key, adapter in wanted:
            total_bytes += self.size_bytes(adapter)
            if total_bytes > self.host.budget_bytes:
                break
            if self.host.get(key) is None and not self.in_host_memory(key) and key not in self.failures:
                self._start(key, adapter)

    def drop_unwanted(self, wanted: Collection[str]) -> None:
        """Let go of images that the budget has no room for and that nobody waits for any more."""
        for key in [key for key in self._unkept if key not in wanted]:
            del self._unkept[key]

    def arrived(self, decision: Decision) -> bool:
        """Take what became of a read that this store started; False where it is another's. All TP ranks call it alike.

        One that was told an adapter is gone meanwhile, or loaded anew, takes nothing.
        """
        if decision.number not in self._wanted:
            return False
        key, adapter = self._wanted.pop(decision.number)
        local = self._reads.finish(decision)
        if self._reading.get(key) != decision.number:
            return True
        del self._reading[key]
        if local is None:
            self._decisions.record("failed", adapter=adapter.name)
            self.failures[key] = self.last_errors[key] = (
                f"{decision.report.error} The adapter was loaded, but is no longer in memory and could not be read "
                "again."
            )
            return True
        self._decisions.record("read", adapter=adapter.name)
        self.load_counts.read_from_disk(key)
        self.last_errors.pop(key, None)
        self._keep(key, adapter, local.image)
        if key not in self.host:
            self._unkept[key] = local.image
        return True

    def take_failures(self) -> dict[str, str]:
        """Messages by key since the last call. The next ``get`` of such an adapter tries again."""
        taken, self.failures = self.failures, {}
        return taken

    def _start(self, key: str, adapter: LoadedAdapter) -> None:
        if key in self._reading:
            return
        self._decisions.record("start-read", adapter=adapter.name)
        number = self._reads.start(adapter.name, adapter.path, partial(self._read_same, adapter))
        self._reading[key] = number
        self._wanted[number] = (key, adapter)

    def _keep(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        for gone in self.host.put(key, self.size_bytes(adapter), image):
            self._decisions.record("host-evict", key=gone)
            self.load_counts.evicted_from_host(gone)

    def _read_same(self, adapter: LoadedAdapter) -> Found:
        """This TP rank's part, refused where it is not what was loaded: cached KV and descriptors belong to that."""
        report, local = self._read_again(adapter)
        if local is not None and (local.shard, local.image_digest) != (adapter.shard, adapter.image_digest):
            error = AdapterError(
                adapter.name,
                f"other contents in {adapter.path}",
                f"those that were loaded (content hash {adapter.content_hash})",
                "Unload the adapter and load it again, or restore its files.",
            )
            return Report(error=str(error)), None
        return dataclasses.replace(report, slots=adapter.slots), local


def image_bytes(slots: int, slot_bytes: int, pinned: bool) -> int:
    """Host memory that the image of an adapter of ``slots`` slots takes."""
    size_bytes = slots * slot_bytes
    return 1 << (size_bytes - 1).bit_length() if pinned else size_bytes  # PyTorch pins powers of two
