"""Describes the base model's linears as one TP rank sees them: what an adapter can attach to. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Part = Literal["layer", "embedding", "head", "expert"]


@dataclass(frozen=True)
class Interval:
    """Positions ``[start, stop)`` of an axis of ``size`` that this TP rank holds.

    ``stop``, and even ``start``, may lie beyond ``size``: SGLang's CPU engine pads heads and the intermediate size with
    zeros until they divide by the TP size. The checkpoint has nothing for those positions, and no adapter touches them.
    """

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        """Positions on this TP rank, padding included."""
        return self.stop - self.start

    @property
    def real(self) -> Interval:
        """The unpadded part; may be empty."""
        return self.within(0, self.size)

    def within(self, offset: int, size: int) -> Interval:
        """The unpadded part, on an axis of ``size`` on which this one starts at ``offset``; may be empty."""
        return Interval(offset + min(self.start, self.size), offset + min(self.stop, self.size), size)


@dataclass(frozen=True)
class Source:
    """A module of the checkpoint that feeds slices of a linear.

    slices   indices of the linear's slices, in the order of the module's rows
    offsets  first row of each of those slices in the module
    size     rows of the module (``out_features`` of the Hugging Face linear)
    A split module (``q_proj``) feeds one slice; a fused one (Phi-3's ``qkv_proj``) feeds all.
    """

    slices: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One (possibly fused) linear of a decoder layer on this TP rank.

    kind      "column": the output is split over TP ranks, or whole on each (latents); "row": the input is split
    inputs    the rank's interval of the input axis (all of it for "column")
    outputs   per slice, the rank's interval of that slice's output axis (all of it for "row")
    sources   checkpoint module path -> what it feeds
    part      where it belongs: to the decoder layer itself, to one of its experts, or, as a part that is only kept with
              the layer, to the model's embeddings ("row", its input is the vocabulary) or its head
    """

    name: str
    kind: Literal["column", "row"]
    inputs: Interval
    outputs: tuple[Interval, ...]
    sources: Mapping[str, Source]
    part: Part = "layer"

    @property
    def out_offsets(self) -> tuple[int, ...]:
        """[slices + 1] local output columns at which each slice starts and ends."""
        offsets = [0]
        for interval in self.outputs:
            offsets.append(offsets[-1] + interval.length)
        return tuple(offsets)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Linears of every layer on one TP rank, and the arena's geometry.

    layers         per decoder layer: its linears in order, its parts of embeddings and head, those of its experts
    row_width      W, elements of an arena row (KV heads of the rank times head dimension, or a latent's width)
    dtype          of the weights in the arena
    left_out       checkpoint modules that the base model has, and that the server was told not to adapt
    no_experts     why no adapter can be on the base model's experts; None where it has none, or adapters can
    no_vocabulary  why none can be on its embeddings and head; None where adapters can
    """

    layers: tuple[tuple[LinearSpec, ...], ...]
    row_width: int
    dtype: torch.dtype
    vocab_size: int
    tp_rank: int
    tp_size: int
    left_out: frozenset[str] = frozenset()
    no_experts: str | None = None
    no_vocabulary: str | None = None

    def find(self) -> dict[str, tuple[int, int]]:
        """Checkpoint module path -> (layer, index of the linear in its layer).

        Embeddings and head have a part in each layer: this is one of them.
        """
        return {
            module: (i, j)
            for i, layer in enumerate(self.layers)
            for j, linear in enumerate(layer)
            for module in linear.sources
        }
