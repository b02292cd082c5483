"""The interface that adds adapters' deltas to a forward pass; there is a torch path and a Triton path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

BatchKind = Literal["decode", "prefill"]
Overlap = Literal["off", "stream", "launch"]


class DeltaAdder(Protocol):
    """Adds the deltas of one batch after another, on one TP rank; ``prepare`` comes before each forward pass."""

    def prepare(self, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        """Set the batch: each request's adapter (None, or one that is not resident: the base model) and its tokens.

        token_counts  tokens of each request in batch order; None: one each (a decode batch)
        """

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        """Called before a linear's own GEMM with its input [tokens, local inputs]: work that can run beside it."""

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        """Add the batch's deltas to ``out`` [tokens, local outputs] of one linear; ``x`` is [tokens, local inputs]."""

    def reset(self) -> None:
        """No adapter until the next ``prepare``."""

    def init_graphs(self, kind: BatchKind, max_tokens: int) -> None:
        """Make ready for CUDA graphs of batches of ``kind`` with up to ``max_tokens`` tokens."""

    def prepare_capture(self, kind: BatchKind, tokens: int) -> None:
        """Set the batch of a CUDA graph that is about to be captured: ``tokens`` rows, any adapters when replayed.

        A decode batch without adapters replays a graph that is captured after ``reset``, so nothing is prepared for it.
        """
