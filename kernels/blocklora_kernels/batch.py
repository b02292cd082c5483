"""Tells the kernels, in device memory, which tokens of which adapter form a tile of this batch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from blocklora_kernels import tiles
from blocklora_kernels.segments import Segments


def cut_into_tiles(starts: np.ndarray, block_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut segments into tiles of at most ``block_tokens`` tokens.

    starts  int32 [G + 1], as in ``Segments``
    Returns the segment, first and end position of each tile, int [tiles].
    """
    firsts, ends = starts[:-1], starts[1:]
    pieces = (ends - firsts + (block_tokens - 1)) // block_tokens
    total = int(pieces.sum())
    if total == len(pieces):  # decode: a tile is a segment
        return np.arange(total), firsts, ends
    segment = np.repeat(np.arange(len(pieces)), pieces)
    piece = np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = firsts[segment] + piece * block_tokens
    return segment, first, np.minimum(first + block_tokens, ends[segment])


H_ALIGNMENT = 16  # columns: rows of h start on whole vectors
HEADER_FIELDS = 2  # tiles of the batch; largest local rank of a slice


class Captured(NamedTuple):
    """What the tiles of a CUDA graph follow from: its tokens, and the rank that its batches were taken to have."""

    tokens: int
    rank: int


class BatchMetadata:
    """Static device buffers of a step's metadata and of h. One object serves all linears, and all CUDA graphs.

    One int32 buffer holds ``[tiles, rank | adapter of tile | start of tile | stop of tile | owners | tokens]``, with 2,
    C, C, C, max_tokens or 0, and max_tokens elements for a capacity of C tiles; a step copies it once. ``h`` is float32
    scratch of one linear at a time: an expand must follow its shrink before the next shrink.
    """

    def __init__(
        self,
        max_tokens: int,
        max_segments: int,
        h_width: int,
        device: torch.device,
        processors: int | None = None,
        invariant_rank: int | None = None,
        owners: bool = False,
    ) -> None:
        """
        max_tokens      most tokens of a batch, base-model tokens included
        max_segments    most distinct adapters of a batch
        h_width         most columns of h of any linear of any adapter: stacked slices' rows of A, times blocks
        processors      multiprocessors that a launch fills; None: those of the device
        invariant_rank  every batch has the tiles of one token and this rank, and no sum is cut: what is computed for a
                        token is the same, bit for bit, whatever is in its batch; None: tiles by what is fastest
        owners          whether ``owners`` is kept: int32 [max_tokens], the adapter of each token, -1 for none
        """
        for name, value in (("max_tokens", max_tokens), ("max_segments", max_segments), ("h_width", h_width)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.arch = tiles.architecture(device)
        self._invariant_rank = invariant_rank
        self.processors = processors or tiles.processors(device)
        self.h_width = h_width
        self.h_stride = -(-h_width // H_ALIGNMENT) * H_ALIGNMENT
        elements = tiles.scratch_rows(self.arch, max_tokens, self.processors) * self.h_stride
        if elements >= 2**31:
            raise ValueError(f"max_tokens, h_width: {max_tokens}, {h_width} need {elements} elements, expected < 2**31")
        self.max_tokens = max_tokens
        self.max_segments = max_segments
        self.device = device
        self.capacity = max_segments + max_tokens // tiles.tiling(self.arch, 1).block_tokens
        self.h = torch.empty(elements, dtype=torch.float32, device=device)
        head = HEADER_FIELDS + 3 * self.capacity
        self._head = head + (max_tokens if owners else 0)
        size = self._head + max_tokens
        self._buffer = torch.zeros(size, dtype=torch.int32, device=device)
        self.tiles, self.owners = self._buffer[:head], self._buffer[head : self._head]
        self.tokens = self._buffer[self._head :]
        on_gpu = device.type == "cuda"
        # Two host buffers in turn: the copy of one step may still be queued while the next step is built.
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in self._hosts] if on_gpu else []
        self._turn = 0
        self.adapters = np.empty(0, np.int32)
        self.batch_tokens = 0
        self.tiling = self._tiling(1)
        self.rank = 1
        self.grid_tiles = 0

    def update(self, segments: Segments, batch_tokens: int, rank: int, graph: Captured | None = None) -> None:
        """Describe the next batch; its launches see it in stream order.

        batch_tokens  rows of the batch's activations, padding and base-model tokens included
        rank          largest local rank of a slice among the batch's adapters: with the tokens it picks the tiles
        graph         of the captured graph that may replay this (no larger) batch: its tiles are used, so a replay and
                      ordinary launches are both right
        """
        self._check(segments, batch_tokens)
        count, capacity = len(segments.tokens), self.capacity
        self._choose(graph or Captured(batch_tokens, rank))
        segment, first, stop = cut_into_tiles(segments.starts, self.tiling.block_tokens)
        host = self._next_host()
        packed = host.numpy()
        packed[:HEADER_FIELDS] = len(segment), rank
        for i, values in enumerate((segments.adapters[segment], first, stop)):
            start = HEADER_FIELDS + i * capacity
            packed[start : start + len(segment)] = values
        if not len(segment):
            packed[HEADER_FIELDS + 2 * capacity] = 0  # no token is adapted
        packed[self._head : self._head + count] = segments.tokens
        owners = packed[self._head - len(self.owners) : self._head]
        if len(owners):
            owners[:] = -1
            owners[segments.tokens] = np.repeat(segments.adapters, np.diff(segments.starts))
        used = self._head + count
        self._buffer[:used].copy_(host[:used], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self.adapters = segments.adapters
        self.batch_tokens = batch_tokens
        self.grid_tiles = len(segment)

    def update_for_capture(self, graph: Captured, batch_tokens: int | None = None) -> None:
        """An empty batch, whose launches serve every batch of at most ``graph.tokens`` tokens when they are replayed.

        batch_tokens  rows of the activations; None: those of the graph
        """
        self.update(Segments.build(np.empty(0, np.int64)), batch_tokens or graph.tokens, graph.rank, graph)
        self.grid_tiles = self.most_tiles(graph.tokens)

    def most_tiles(self, batch_tokens: int) -> int:
        """Most tiles that ``batch_tokens`` tokens of at most ``max_segments`` adapters can form."""
        block = self._tiling(batch_tokens).block_tokens
        return (batch_tokens + min(batch_tokens, self.max_segments) * (block - 1)) // block

    @property
    def rank_class(self) -> int:
        """The rank that tiles are chosen for; kernels are compiled for these alone."""
        return tiles.rank_class(self.arch, self.rank)

    def _choose(self, graph: Captured) -> None:
        self.tiling = self._tiling(graph.tokens)
        self.rank = self._invariant_rank or graph.rank

    def _tiling(self, tokens: int) -> tiles.Tiling:
        if self._invariant_rank is None:
            return tiles.tiling(self.arch, tokens)
        return tiles.tiling(self.arch, 1)._replace(most_splits=1)

    def _next_host(self) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._hosts)
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._hosts[self._turn]

    def _check(self, segments: Segments, batch_tokens: int) -> None:
        if not 0 <= batch_tokens <= self.max_tokens:
            raise ValueError(f"batch_tokens: got {batch_tokens}, expected 0 to max_tokens = {self.max_tokens}")
        if len(segments.adapters) > self.max_segments:
            raise ValueError(
                f"segments: {len(segments.adapters)} adapters, expected at most max_segments = {self.max_segments}"
            )
        if len(segments.tokens) and int(segments.tokens.max()) >= batch_tokens:
            raise ValueError(
                f"segments: token row {int(segments.tokens.max())}, expected less than batch_tokens = {batch_tokens}"
            )
