"""Keeps what captured CUDA graphs of one kind of batch read, and which of them could replay a batch."""

from __future__ import annotations

from bisect import bisect_left, insort

from blocklora_kernels.batch import BatchMetadata, Captured


class Graphs:
    """CUDA graphs of decode batches, or of prefill batches, that read one ``BatchMetadata`` at fixed addresses.

    rank  largest local rank of a slice that their batches are taken to have: it picks the tiles; any is served right
    """

    def __init__(self, batch: BatchMetadata, rank: int) -> None:
        self.batch = batch
        self._rank = rank
        self._sizes: list[int] = []

    def prepare_capture(self, tokens: int) -> None:
        """Set the batch of a graph that is about to be captured: ``tokens`` rows, any adapters when it is replayed."""
        if tokens not in self._sizes:
            insort(self._sizes, tokens)
        self.batch.update_for_capture(Captured(tokens, self._rank))

    def that_holds(self, tokens: int) -> Captured | None:
        """The smallest graph that a batch of ``tokens`` fits, which upstream replays if it replays one."""
        position = bisect_left(self._sizes, tokens)
        return Captured(self._sizes[position], self._rank) if position < len(self._sizes) else None
