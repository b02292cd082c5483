"""Keeps one record per adapter's contents in the radix tree, found by every name under which they are loaded."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import torch

from sglang_blocklora.memory.prefix import marks


@dataclass(kw_only=True, eq=False)
class Entry:
    """What the cache knows of one adapter's contents.

    content_hash  sha256 in hex; the namespace of its weights and KV
    marks         keys of its slots: whole pages; not to be changed
    number        of the contents of an activated adapter, which no other contents have; None for other adapters
    lora_ids      the ids under which it is loaded
    pins          those of them that hold it in the tree
    node          the tree's node of its weights, None where it is not resident (upstream never uses a number again)
    slots         that hold its weights, int64 on the pool's device, None where it is not resident
    """

    content_hash: str
    marks: array[int]
    number: int | None = None
    lora_ids: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    node: int | None = None
    slots: torch.Tensor | None = None


class Entries:
    """All entries that have an id or are resident; others are forgotten.

    resident      by content hash, in order of loading
    nodes         of those
    pinned_slots  slots of those with pins
    activated     numbers of activated adapters' contents, whose KV may outlive their weights: kept when an entry is
                  forgotten, until ``forget_numbers``
    """

    def __init__(self) -> None:
        self.resident: dict[str, Entry] = {}
        self.nodes: set[int] = set()
        self.pinned_slots = 0
        self.activated: dict[str, int] = {}
        self._last_number = 0
        self._by_id: dict[str, Entry] = {}
        self._by_contents: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._by_contents)

    def __contains__(self, lora_id: str | None) -> bool:
        return lora_id in self._by_id

    def __getitem__(self, lora_id: str) -> Entry:
        return self._by_id[lora_id]

    def get(self, lora_id: str | None) -> Entry | None:
        """The entry of a loaded adapter, else None."""
        return self._by_id.get(lora_id) if lora_id is not None else None

    def know(self, lora_id: str, content_hash: str, slots: int, activated: bool = False) -> None:
        """Load contents of ``slots`` slots under an id. ``ValueError`` where either is known otherwise."""
        entry = self._by_contents.get(content_hash) or Entry(content_hash=content_hash, marks=marks(slots))
        if activated and entry.number is None:
            entry.number = self._number_of(content_hash)
        if len(entry.marks) != slots or self._by_id.get(lora_id, entry) is not entry:
            raise ValueError(f"{lora_id} cannot be {slots} slots of {content_hash}: one of them is known otherwise")
        self._by_contents[content_hash] = self._by_id[lora_id] = entry
        entry.lora_ids.add(lora_id)

    def forget(self, lora_id: str) -> None:
        """An id is gone for good; it holds no pin. Nothing where it is not known."""
        entry = self._by_id.pop(lora_id, None)
        if entry is not None:
            entry.lora_ids.discard(lora_id)
            self._drop(entry)

    def came(self, entry: Entry, node: int, slots: torch.Tensor) -> None:
        """An adapter is in the tree."""
        entry.node, entry.slots = node, slots
        self.nodes.add(node)
        self.resident[entry.content_hash] = entry

    def went(self, entry: Entry) -> None:
        """An adapter is no longer in the tree, and its pins with it."""
        if entry.pins:
            self.pinned_slots -= len(entry.marks)
        entry.pins.clear()
        self.nodes.discard(entry.node)
        entry.node = entry.slots = None
        del self.resident[entry.content_hash]
        self._drop(entry)

    def pin(self, lora_id: str) -> int | None:
        """Pin an adapter under an id; its node where nobody had, else None. ``KeyError`` unless it is resident."""
        entry = self.resident[self._by_id[lora_id].content_hash]
        first = not entry.pins
        entry.pins.add(lora_id)
        self.pinned_slots += len(entry.marks) if first else 0
        return entry.node if first else None

    def unpin(self, lora_id: str) -> int | None:
        """Undo ``pin``; the adapter's node where it was the last pin, else None."""
        entry = self._by_id.get(lora_id)
        if entry is None or lora_id not in entry.pins:
            return None
        entry.pins.discard(lora_id)
        self.pinned_slots -= 0 if entry.pins else len(entry.marks)
        return None if entry.pins else entry.node

    def forget_numbers(self) -> None:
        """The tree is empty: contents that are not loaded may have another number when they come again."""
        self.activated = {known: number for known, number in self.activated.items() if known in self._by_contents}

    def _number_of(self, content_hash: str) -> int:
        if content_hash not in self.activated:
            self._last_number += 1
            self.activated[content_hash] = self._last_number
        return self.activated[content_hash]

    def _drop(self, entry: Entry) -> None:
        if not entry.lora_ids and entry.slots is None:
            self._by_contents.pop(entry.content_hash, None)
