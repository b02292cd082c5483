"""Images of loaded adapters below the arena: in host memory, or read again from the adapter's folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.loading import Outcome, merge
from sglang_blocklora.memory.counts import LoadCounts
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.host_tier import HostTier
from sglang_blocklora.memory.loaded import LoadedAdapter

# Reads this TP rank's part of an adapter again; runs in another thread too, and never raises.
Read = Callable[[LoadedAdapter], Outcome]
# Every TP rank's outcome in rank order, given one's own; all ranks call it together.
Exchange = Callable[[Outcome], Sequence[Outcome]]


class ImageStore:
    """Gives the packed image of a loaded adapter: from the host tier, or from disk where it is not there.

    The host tier holds an image, or the read in a background thread that will give it. Nothing ever asks whether such a
    read is done: ``get`` waits for it, and then the TP ranks exchange what they found, so all of them have the image or
    none has. ``failures`` holds the message for each adapter that could not be read, until ``take_failures``;
    ``last_errors`` holds it until the adapter is read.
    """

    def __init__(
        self,
        budget_bytes: int,
        slot_bytes: int,
        read: Read,
        exchange: Exchange,
        decisions: DecisionLog,
        *,
        pinned: bool = False,
    ) -> None:
        """slot_bytes  bytes of one slot on a TP rank, over all layers and both planes
        pinned      whether ``read`` gives images in page-locked memory
        """
        self.host: HostTier[torch.Tensor | Future[Outcome]] = HostTier(budget_bytes)
        self.load_counts = LoadCounts()
        self.failures: dict[str, str] = {}
        self.last_errors: dict[str, str] = {}
        self._slot_bytes = slot_bytes
        self._pinned = pinned
        self._read = read
        self._exchange = exchange
        self._decisions = decisions
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-read")

    def size_bytes(self, adapter: LoadedAdapter) -> int:
        """What an image costs in host memory: the same on every TP rank."""
        size_bytes = adapter.slots * self._slot_bytes
        return 1 << (size_bytes - 1).bit_length() if self._pinned else size_bytes  # PyTorch pins powers of two

    def add(self, key: str, adapter: LoadedAdapter, image: torch.Tensor) -> None:
        """Take the image [layers, 2, slots, W] of an adapter that was just loaded, as far as the budget goes."""
        self._hold(key, adapter, image)

    def remove(self, key: str) -> None:
        """Forget an adapter."""
        self.host.remove(key)
        self.failures.pop(key, None)
        self.last_errors.pop(key, None)
        self.load_counts.forget(key)

    def in_host_memory(self, key: str) -> bool:
        """Whether the image is at hand; one that was prefetched is so once ``get`` has taken it, on all ranks alike."""
        held = self.host.peek(key)
        return held is not None and not isinstance(held, Future)

    def prefetch(self, wanted: Sequence[tuple[str, LoadedAdapter]]) -> None:
        """Start to read the images that will be needed soon, most urgent first, in a background thread.

        As many as the budget holds together; only images that are not ``wanted`` give way.
        """
        missing, total_bytes = [], 0
        for key, adapter in wanted:
            total_bytes += self.size_bytes(adapter)
            if total_bytes > self.host.budget_bytes:
                break
            if self.host.get(key) is None:
                missing.append((key, adapter))
        for key, adapter in missing:
            self._decisions.record("prefetch", adapter=adapter.name)
            self._hold(key, adapter, self._reader.submit(self._read_again, adapter))

    def get(self, key: str, adapter: LoadedAdapter) -> torch.Tensor | None:
        """The image, or None where no TP rank may use one: ``failures`` says why. All ranks call it together."""
        if key in self.failures:
            return None
        held = self.host.get(key)
        if held is not None and not isinstance(held, Future):
            return held
        agreed = own = None
        if held is not None:
            own = held.result()
            agreed = merge(self._exchange(own))
        if own is None or agreed is None or agreed.error is not None:  # a read ahead may have failed on an older state
            own = self._read_again(adapter)
            agreed = merge(self._exchange(own))
        if agreed.error is not None:
            self._decisions.record("failed", adapter=adapter.name)
            self.host.remove(key)
            self.failures[key] = self.last_errors[key] = (
                f"{agreed.error} The adapter was loaded, but is no longer in memory and could not be read again."
            )
            return None
        assert own.image is not None
        self._decisions.record("read", adapter=adapter.name)
        self.load_counts.read_from_disk(key)
        self.last_errors.pop(key, None)
        self._hold(key, adapter, own.image)
        return own.image

    def take_failures(self) -> dict[str, str]:
        """Messages by key since the last call. The next ``get`` of such an adapter tries again."""
        taken, self.failures = self.failures, {}
        return taken

    def _hold(self, key: str, adapter: LoadedAdapter, value: torch.Tensor | Future[Outcome]) -> None:
        for gone in self.host.put(key, self.size_bytes(adapter), value):
            self._decisions.record("host-evict", key=gone)
            self.load_counts.evicted_from_host(gone)

    def _read_again(self, adapter: LoadedAdapter) -> Outcome:
        """This TP rank's part, refused where it is not what was loaded: cached KV and descriptors belong to that."""
        found = self._read(adapter)
        if found.error is None and (found.shard, found.image_digest) != (adapter.shard, adapter.image_digest):
            error = AdapterError(
                adapter.name,
                f"other contents in {adapter.path}",
                f"those that were loaded (content hash {adapter.content_hash})",
                "Unload the adapter and load it again, or restore its files.",
            )
            return Outcome(str(error), 0)
        return found
