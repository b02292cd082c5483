"""Tells the kernels which pairs of a token and an expert form a tile: one expert of one adapter.

The router's choice is known on the device only, so tiles are cut there: pairs are sorted by (adapter, expert), by
operations of torch whose shapes follow from the batch's size alone. The host waits for nothing, and a CUDA graph can
hold all of it. What a tile is of has one number, ``adapter * experts + expert``.
"""

from __future__ import annotations

import torch

from blocklora_kernels import tiles
from blocklora_kernels.batch import H_ALIGNMENT, HEADER_FIELDS


class ExpertBatch:
    """Static device buffers of one layer's tiles and of h; one object serves all layers of experts, one after another.

    Has what ``LoraLinear`` asks of ``BatchMetadata``; its rows are pairs, pair ``t * choices + c`` of token t. With one
    expert and one choice it is a batch of any rows whose adapters only the device knows.
    """

    def __init__(
        self,
        max_tokens: int,
        choices: int,
        experts: int,
        adapters: int,
        h_width: int,
        device: torch.device,
        processors: int | None = None,
    ) -> None:
        """
        max_tokens  most tokens of a batch
        choices     experts that the router chooses for each token
        experts     of a layer; adapters: entries of the ``AdapterTable``
        h_width     most columns of h of any linear of any expert
        processors  multiprocessors that a launch fills; None: those of the device
        """
        pairs = max_tokens * choices
        self.choices, self.experts = choices, experts
        self._owners = adapters * experts
        self.arch = tiles.architecture(device)
        self.processors = processors or tiles.processors(device)
        self.h_width = h_width
        self.h_stride = -(-h_width // H_ALIGNMENT) * H_ALIGNMENT
        elements = tiles.scratch_rows(self.arch, pairs, self.processors) * self.h_stride
        if elements >= 2**31:
            raise ValueError(f"max_tokens, h_width: {max_tokens}, {h_width} need {elements} elements, expected < 2**31")
        self.max_pairs = pairs
        self.capacity = self._most_tiles(pairs, tiles.tiling(self.arch, 1).block_tokens)
        self.h = torch.empty(elements, dtype=torch.float32, device=device)
        self.tiles = torch.zeros(HEADER_FIELDS + 3 * self.capacity, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(pairs, dtype=torch.int32, device=device)
        self._edges = torch.arange(self._owners + 1, dtype=torch.int64, device=device)
        self._numbers = torch.arange(self.capacity, dtype=torch.int64, device=device)
        self.tiling = tiles.tiling(self.arch, 1)
        self.batch_tokens = self.grid_tiles = 0
        self.rank = 1

    @property
    def rank_class(self) -> int:
        """The rank that tiles are chosen for."""
        return tiles.rank_class(self.arch, self.rank)

    def update(self, ids: torch.Tensor, owners: torch.Tensor, rank: int) -> None:
        """Cut the tiles of one layer, in stream order.

        ids     int [tokens, choices], the router's choice; negative: none
        owners  int32 [at least tokens], the adapter of each token, negative: none (``BatchMetadata.owners``)
        rank    largest local rank of a slice, which tiles are chosen for
        """
        tokens = len(ids)
        pairs = tokens * self.choices
        if ids.shape[1] != self.choices or pairs > self.max_pairs:
            raise ValueError(
                f"ids: got shape {tuple(ids.shape)}, expected [tokens, {self.choices}] of {self.max_pairs}"
            )
        self.rank = rank
        self.tiling = tiles.tiling(self.arch, pairs)
        self.batch_tokens = pairs
        block = self.tiling.block_tokens
        self.grid_tiles = count = self._most_tiles(pairs, block)
        owners = owners[:tokens, None]
        # Products in the place of ``torch.where``, which would copy its scalar from pageable memory.
        own = ((owners * self.experts + ids - self._owners) * ((owners >= 0) & (ids >= 0)) + self._owners).view(-1)
        own, order = torch.sort(own.long(), stable=True)
        self.tokens[:pairs] = order
        edges = torch.searchsorted(own, self._edges)  # where the pairs of each owner start; the last: of nobody
        starts, ends = edges[:-1], edges[1:]
        pieces = (ends - starts + (block - 1)) // block
        last = pieces.cumsum(0)  # tiles up to and with each owner's
        numbers = self._numbers[:count]
        owner = torch.searchsorted(last, numbers, right=True).clamp_(max=self._owners - 1)
        first = starts[owner] + (numbers - (last - pieces)[owner]) * block
        table = self.tiles[HEADER_FIELDS:].view(3, self.capacity)
        table[0, :count] = owner
        table[1, :count] = first
        table[2, :count] = torch.minimum(first + block, ends[owner])
        self.tiles[0] = last[-1]
        self.tiles[1] = rank

    def _most_tiles(self, pairs: int, block: int) -> int:
        """Most tiles that ``pairs`` can form."""
        return (pairs + min(pairs, self._owners) * (block - 1)) // block
