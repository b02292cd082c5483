"""Embeddings and head of a model as linears whose one side is the vocabulary.

Of embeddings the input is split over TP ranks (a token's id picks a column of A), of the head the output. Each rank's
part is cut once more, into one part for each decoder layer, and kept in that layer's rows: an adapter has as many rows
in every layer, so what is large is dealt out. The other factor, which is small, lies beside each part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import Interval, LinearSpec, Part, Source

EMBEDDING, HEAD = "embed_tokens", "lm_head"
# The last part of a checkpoint module's path -> which side of it TP splits, and what it is.
KINDS: Mapping[str, tuple[Literal["column", "row"], Part]] = {
    EMBEDDING: ("row", "embedding"),
    HEAD: ("column", "head"),
}


@dataclass(frozen=True)
class Vocabulary:
    """Paths of the modules in the checkpoint, and the token ids that this TP rank has of both; may hold padding."""

    embedding: str
    head: str
    ids: Interval


def cut_vocabulary(vocabulary: Vocabulary, layers: int, hidden: Interval) -> list[tuple[LinearSpec, LinearSpec]]:
    """Per decoder layer, the part of embeddings and of head that is kept with it.

    The parts follow one another and have a multiple of 8 token ids, as many as the others but for the last ones.
    """
    ids = vocabulary.ids
    step = -(-ids.length // (layers * ALIGNMENT_ELEMENTS)) * ALIGNMENT_ELEMENTS
    edges = [min(ids.start + i * step, ids.stop) for i in range(layers + 1)]
    return [_part(vocabulary, Interval(*edge, ids.size), hidden) for edge in itertools.pairwise(edges)]


def _part(vocabulary: Vocabulary, ids: Interval, hidden: Interval) -> tuple[LinearSpec, LinearSpec]:
    where = f"[{ids.start}:{ids.stop}]"
    return (
        LinearSpec(
            name=f"{vocabulary.embedding}{where}",
            kind="row",
            inputs=ids,
            outputs=(hidden,),
            sources={vocabulary.embedding: Source((0,), (0,), hidden.size)},
            part="embedding",
        ),
        LinearSpec(
            name=f"{vocabulary.head}{where}",
            kind="column",
            inputs=hidden,
            outputs=(ids,),
            sources={vocabulary.head: Source((0,), (0,), ids.size)},
            part="head",
        ),
    )
