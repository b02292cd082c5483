"""Tells subscribers of KV events about a tree with adapters in it (``mem_cache/events.py``).

Upstream's tree would publish the marks of adapters' slots, and its hashes have no room for them (32 bits a
token). So the tree's own recording stays off and blocks are recorded here: KV only, with its own tokens, and the first
block behind an adapter without a parent.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, StorageMedium
from sglang.srt.mem_cache.events import KVCacheEventRecorder


@dataclass(frozen=True)
class Namespace:
    """What cached KV belongs to: an adapter's contents (None: the base model), a user's extra key, a cache salt."""

    content_hash: str | None
    extra_key: str | None
    cache_salt: str | None

    @property
    def lora_id(self) -> int | None:
        """The number that events carry: the first 15 hex digits of the adapter's content hash."""
        return None if self.content_hash is None else int(self.content_hash[:15], 16)

    @property
    def seed(self) -> bytes:
        """What a chain of block hashes starts with; upstream's own where it tells namespaces apart."""
        if self.content_hash is None and self.extra_key is None:
            if self.cache_salt is None:
                return b""
            return hashlib.sha256(b"sglang-cache-salt-v1\0" + self.cache_salt.encode()).digest()
        parts = repr((self.content_hash, self.extra_key, self.cache_salt))
        return hashlib.sha256(b"sglang-blocklora-namespace-v1\0" + parts.encode()).digest()


class KVEvents:
    """Events of one cache, queued until they are taken. A block is a page of tokens and everything before it."""

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        self._recorder = KVCacheEventRecorder(enabled=True, page_size=page_size)
        self._digests: dict[int, bytes] = {}  # page of the pool -> digest of the block whose KV it holds

    def stored(
        self,
        namespace: Namespace,
        tokens: Sequence[int],
        slots: torch.Tensor,
        known: int,
        new: int,
        session: str | None,
    ) -> None:
        """KV of ``tokens[new:]`` came into the tree, in ``slots[new:]``; whole pages.

        known  tokens at the beginning whose ``slots`` are the tree's own, at most ``new``
        """
        if new >= len(slots):
            return
        start = known // self._page * self._page
        digest = self._digests[int(slots[start - 1]) // self._page] if start else namespace.seed
        parent, blocks = None, list(self._chain(digest, tokens[start : len(slots)]))
        if new:
            parent = _as_int64(blocks[(new - start) // self._page - 1] if new > start else digest)
        fresh = blocks[(new - start) // self._page :]
        pages = (slots[new :: self._page] // self._page).tolist()
        self._digests.update(zip(pages, fresh, strict=True))
        self._recorder.enqueue(
            BlockStored(
                block_hashes=[_as_int64(digest) for digest in fresh],
                parent_block_hash=parent,
                token_ids=list(tokens[new : len(slots)]),
                block_size=self._page,
                lora_id=namespace.lora_id,
                medium=StorageMedium.GPU,
                cache_salt=namespace.cache_salt,
                session_id=session,
            )
        )

    def removed(self, slots: torch.Tensor) -> None:
        """The tree gave up ``slots``, whole pages; those of adapters' weights are nobody's business."""
        pages = (slots[:: self._page] // self._page).tolist()
        digests = [self._digests.pop(page) for page in pages if page in self._digests]
        if digests:
            self._recorder.enqueue(BlockRemoved([_as_int64(digest) for digest in digests], StorageMedium.GPU))

    def cleared(self) -> None:
        """The tree is empty."""
        self._digests.clear()
        self._recorder.enqueue(AllBlocksCleared())

    def take(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """All events since the last call."""
        return self._recorder.take()

    def _chain(self, digest: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        """Upstream's block hashes: sha256 of the digest before and the page's tokens as 32-bit numbers."""
        for start in range(0, len(tokens), self._page):
            digest = hashlib.sha256(digest + array("I", tokens[start : start + self._page]).tobytes()).digest()
            yield digest


def _as_int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)
