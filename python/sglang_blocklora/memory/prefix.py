"""An adapter as a prefix: the pseudo tokens that stand for its slots in the radix tree's keys."""

from __future__ import annotations

import hashlib
from array import array
from functools import lru_cache

# Bit 62 marks pseudo tokens: no token of a vocabulary, salted or not, reaches it.
PSEUDO_BIT = 1 << 62
INDEX_BITS = 20  # slots of one adapter: fewer than a million
HASH_BITS = 42
SALT_SHIFT = 32  # above every token of a vocabulary


@lru_cache(maxsize=1024)
def pseudo_tokens(content_hash: str, slots: int) -> array[int]:
    """Keys (int64) of an adapter's ``slots`` slots: distinct ones, and others for other contents. Not to be changed.

    content_hash  sha256 in hex; its pieces are spread over the tokens, so four slots tell 168 bits of it apart
    ``ValueError`` for more slots than an index can count.
    """
    if slots >= 1 << INDEX_BITS:
        raise ValueError(f"an adapter of {slots} slots; at most {(1 << INDEX_BITS) - 1} can be told apart")
    value = int(content_hash, 16)
    pieces = [value >> (i * HASH_BITS) & ((1 << HASH_BITS) - 1) for i in range(4)]
    return array("q", [PSEUDO_BIT | pieces[i % 4] << INDEX_BITS | i for i in range(slots)])


def salted_tokens(tokens: array[int], extra_key: str | None, cache_salt: str | None) -> array[int]:
    """Keys of a request's own tokens: as they are, or with a hash of its extra key and salt in their high bits.

    So KV of different salts stands apart behind one copy of the adapter's weights.
    """
    if not extra_key and not cache_salt:
        return tokens
    text = f"{len(extra_key or '')}:{extra_key or ''}{cache_salt or ''}"
    digest = hashlib.sha256(text.encode()).digest()
    salt = (int.from_bytes(digest[:4], "little") >> 3 | 1) << SALT_SHIFT  # 29 bits, never zero, below PSEUDO_BIT
    return array("q", [token | salt for token in tokens])
