"""Groups the tokens of a batch by adapter: the only metadata that change from step to step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Segments:
    """Adapted tokens of one batch, sorted by adapter (stable), base-model tokens left out. Host memory.

    tokens   int32 [T]      token rows of the batch; tokens of one adapter are adjacent
    starts   int32 [G + 1]  segment g is ``tokens[starts[g]:starts[g + 1]]``; never empty
    adapters int32 [G]      table index of each segment's adapter, ascending
    """

    tokens: np.ndarray
    starts: np.ndarray
    adapters: np.ndarray

    @staticmethod
    def build(adapters: np.ndarray, token_counts: np.ndarray | None = None) -> Segments:
        """Group the tokens of requests by adapter.

        adapters      int [requests], table index of each request's adapter, negative for the base model
        token_counts  int [requests], tokens of each request in batch order; None: one each (decode)
        """
        per_token = adapters if token_counts is None else np.repeat(adapters, token_counts)
        order = np.argsort(per_token, kind="stable").astype(np.int32)
        ordered = per_token[order]
        first = int(np.searchsorted(ordered, 0))
        tokens, ordered = order[first:], ordered[first:]
        edges = np.flatnonzero(np.diff(ordered, prepend=-1)) if len(ordered) else np.empty(0, np.int64)
        starts = np.append(edges, len(tokens)).astype(np.int32)
        return Segments(tokens, starts, ordered[edges].astype(np.int32))

    def rows(self, index: int) -> slice | torch.Tensor:
        """Token rows of segment ``index``: a slice where they are adjacent (no gather needed), else int64 indices."""
        tokens = self.tokens[self.starts[index] : self.starts[index + 1]]
        first, last = int(tokens[0]), int(tokens[-1])
        if last - first + 1 == len(tokens):  # the stable sort keeps tokens of one adapter ascending
            return slice(first, last + 1)
        return torch.from_numpy(tokens.astype(np.int64))
