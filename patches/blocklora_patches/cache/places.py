"""Finds where in the tree a request's KV lies, and what a lock of it must hold beside the path.

Three kinds of requests (keys: ``sglang_blocklora/memory/prefix.py``):

- of the base model: at the root of its namespace, as upstream has it;
- with an adapter: behind the adapter's weights, in the namespace of its contents;
- with an activated adapter: as the base model's up to the invocation, so that it is found by all, and from there on
  under tokens that no others have. The weights are on no such path, so its nodes carry them (``ActivatedNode``).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang_blocklora.memory.entries import Entries, Entry
from sglang_blocklora.memory.prefix import (
    activated_tokens,
    are_token_ids,
    leading_ids,
    request_key,
    salted_tokens,
    split_key,
)

NOTHING = RadixKey(array("q"))


@dataclass(slots=True)
class Place:
    """Where a request's KV lies in the tree: under ``key``.

    entry           its adapter (None: the base model)
    own_extra       the extra key that the client sent
    activated_from  first token that is the adapter's, where it is an activated one: its weights are not in ``key``
    """

    entry: Entry | None
    own_extra: str | None
    key: RadixKey
    activated_from: int | None = None

    @property
    def weights(self) -> int:
        """Slots of weights that the key begins with."""
        return 0 if self.entry is None or self.activated_from is not None else len(self.entry.marks)

    def handle(self, node: int) -> int:
        """``node``, on the path of ``key``, so that a lock of it holds the weights too, wherever they are."""
        if self.entry is None or self.activated_from is None or self.entry.node is None:
            return node
        return ActivatedNode(node, self.entry.node)


class ActivatedNode(int):
    """A node of the tree that a request with an activated adapter has: who locks it locks ``weights``, a node, too."""

    weights: int

    def __new__(cls, node: int, weights: int) -> ActivatedNode:
        made = super().__new__(cls, node)
        made.weights = weights
        return made


def find_place(entries: Entries, key: RadixKey) -> Place | None:
    """Where the KV of a request's key lies; None where its adapter is not in the tree, or not known (any more).

    With an id that is none of a vocabulary, and could pass for a salted or activated one, a request has its adapter and
    nothing else of the tree; without an adapter, what is before that id.
    """
    try:
        lora_id, own_extra, activated_from = split_key(key.extra_key)
    except ValueError:
        return None
    tokens = key.raw_token_ids()
    ordinary = are_token_ids(tokens)
    if lora_id is None:
        own = key if ordinary else RadixKey(leading_ids(tokens), key.extra_key, cache_salt=key.cache_salt)
        return Place(None, own_extra, own)
    entry = entries.get(lora_id)
    if entry is None:
        return None
    if entry.number is not None:
        first = activated_from or 0
        if not ordinary:
            return Place(entry, own_extra, NOTHING, first)
        marked = activated_tokens(tokens, first, entry.number)
        own = RadixKey(marked, request_key(None, own_extra), cache_salt=key.cache_salt)
        return Place(entry, own_extra, own, first)
    if entry.slots is None:
        return None
    behind = entry.marks + salted_tokens(tokens, own_extra, key.cache_salt) if ordinary else entry.marks
    return Place(entry, own_extra, RadixKey(behind, entry.content_hash))
