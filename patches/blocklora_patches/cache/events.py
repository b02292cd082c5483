"""Tells subscribers of KV events about a tree with adapters in it (``mem_cache/events.py``).

Upstream's tree would publish the marks of adapters' slots, and its hashes have no room for them (32 bits a
token). So the tree's own recording stays off and blocks are recorded here: KV only, with its own tokens, and the first
block behind an adapter without a parent.

Blocks are known by their slots, which only the device knows. Those are copied to the host beside the scheduler's steps,
and what happened is told in order once they are there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, StorageMedium
from sglang.srt.mem_cache.events import KVCacheEventRecorder


@dataclass(frozen=True)
class Namespace:
    """What cached KV belongs to: an adapter's contents (None: the base model), a user's extra key, a cache salt.

    activated_from  first token that is an activated adapter's; those before it are the base model's
    """

    content_hash: str | None
    extra_key: str | None
    cache_salt: str | None
    activated_from: int | None = None

    @property
    def lora_id(self) -> int | None:
        """The number that events carry: the first 15 hex digits of the adapter's content hash."""
        return None if self.content_hash is None else int(self.content_hash[:15], 16)

    @property
    def seed(self) -> bytes:
        """What a chain of block hashes starts with; upstream's own where it tells namespaces apart."""
        if self.activated_from is not None:
            return Namespace(None, self.extra_key, self.cache_salt).seed
        if self.content_hash is None and self.extra_key is None:
            if self.cache_salt is None:
                return b""
            return hashlib.sha256(b"sglang-cache-salt-v1\0" + self.cache_salt.encode()).digest()
        parts = repr((self.content_hash, self.extra_key, self.cache_salt))
        return hashlib.sha256(b"sglang-blocklora-namespace-v1\0" + parts.encode()).digest()


class HostCopy:
    """Slots on their way to the host."""

    def __init__(self, slots: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._slots = slots
        if slots.is_cuda:
            self._slots = torch.empty(len(slots), dtype=slots.dtype, pin_memory=True)
            self._slots.copy_(slots, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def is_there(self) -> bool:
        """Whether the host has them, without waiting."""
        return self._done is None or self._done.query()

    def get(self) -> list[int]:
        """The slots; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[int] = self._slots.tolist()
        return numbers


class KVEvents:
    """Events of one cache, queued until they are taken. A block is a page of tokens and everything before it."""

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        # What happened and is not told yet: the slots it was about, and what tells of it.
        self._untold: deque[tuple[HostCopy, Callable[[list[int]], None]]] = deque()
        self._late = 0  # of those, how many had to wait for their slots when events were taken last
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
        if new < len(slots):
            start = known // self._page * self._page
            before = slots[start - 1 : start] if start else slots[:0]
            tell = partial(self._tell_stored, namespace, tokens[: len(slots)], start, new, session)
            self._untold.append((HostCopy(torch.cat([before, slots[new :: self._page]])), tell))

    def removed(self, slots: torch.Tensor) -> None:
        """The tree gave up ``slots``, whole pages; those of adapters' weights are nobody's business."""
        self._untold.append((HostCopy(slots[:: self._page]), self._tell_removed))

    def cleared(self) -> None:
        """The tree is empty."""
        self._untold.append((HostCopy(torch.empty(0, dtype=torch.int64)), self._tell_cleared))

    def take(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """All events since the last call, but for the last ones where their slots are not on the host yet.

        They come with the next call, which waits for them if it must.
        """
        while self._untold and (self._late > 0 or self._untold[0][0].is_there()):
            slots, tell = self._untold.popleft()
            tell(slots.get())
            self._late -= 1
        self._late = len(self._untold)
        return self._recorder.take()

    def _tell_stored(
        self,
        namespace: Namespace,
        tokens: Sequence[int],
        start: int,
        new: int,
        session: str | None,
        slots: list[int],
    ) -> None:
        """Of ``tokens``, those from ``new`` on were stored.

        slots  that before token ``start``, where there is one, then the first of each new page
        """
        end = len(tokens)
        # The page of the invocation is the adapter's as a whole: nobody else finds it.
        own_from = min((namespace.activated_from or 0) // self._page * self._page, end)
        before = self._digests[slots.pop(0) // self._page] if start else namespace.seed
        blocks = list(self._chain(before, tokens[start : max(own_from, start)]))
        digest = blocks[-1] if blocks else before
        if namespace.activated_from is not None and start <= own_from:
            parts = repr((namespace.content_hash, namespace.activated_from))
            digest = hashlib.sha256(digest + parts.encode()).digest()
        blocks += self._chain(digest, tokens[max(own_from, start) :])
        fresh = blocks[(new - start) // self._page :]
        self._digests.update(zip((slot // self._page for slot in slots), fresh, strict=True))
        for first, last, lora_id in ((new, own_from, None), (max(new, own_from), end, namespace.lora_id)):
            if first < last:
                i = (first - start) // self._page
                self._recorder.enqueue(
                    BlockStored(
                        block_hashes=[_as_int64(one) for one in blocks[i : (last - start) // self._page]],
                        parent_block_hash=_as_int64(blocks[i - 1] if i else before) if first else None,
                        token_ids=list(tokens[first:last]),
                        block_size=self._page,
                        lora_id=lora_id,
                        medium=StorageMedium.GPU,
                        cache_salt=namespace.cache_salt,
                        session_id=session,
                    )
                )

    def _tell_removed(self, slots: list[int]) -> None:
        pages = [slot // self._page for slot in slots]
        digests = [self._digests.pop(page) for page in pages if page in self._digests]
        if digests:
            self._recorder.enqueue(BlockRemoved([_as_int64(digest) for digest in digests], StorageMedium.GPU))

    def _tell_cleared(self, slots: list[int]) -> None:
        self._digests.clear()
        self._recorder.enqueue(AllBlocksCleared())

    def _chain(self, digest: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
        """Upstream's block hashes: sha256 of the digest before and the page's tokens as 32-bit numbers."""
        for start in range(0, len(tokens), self._page):
            digest = hashlib.sha256(digest + array("I", tokens[start : start + self._page]).tobytes()).digest()
            yield digest


def _as_int64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)
