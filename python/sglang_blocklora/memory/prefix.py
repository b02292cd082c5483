"""Makes keys of the radix tree, so that nothing a client writes can be taken for an adapter's.

A key of the tree is a namespace (a string that SGLang's tree compares at every node) and tokens (int64). Four kinds:

| whose                     | namespace                                     | tokens                                  |
|---------------------------|-----------------------------------------------|-----------------------------------------|
| the base model            | none, or ``:`` and the client's ``extra_key`` | the request's                           |
| an adapter's weights      | its content hash in hex, without a ``:``      | S marks, 0 to S - 1                     |
| a request with an adapter | the same                                      | the S marks, then the request's, salted |
| with an activated adapter | the base model's                              | the request's; from the invocation on   |
|                           |                                               | with the number of the contents above   |

What a client sends is behind the colon, or behind the marks, or below a number or hash that is marked by a bit no token
has.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

TOKEN_BITS = 32  # of ids that are cached; every vocabulary is smaller
SALTED = 1 << 62  # set in salted and activated tokens and no others
_SALT_BITS = 30  # of each token, between the id and SALTED; eight tokens in a row tell 240 bits of a salt


def request_key(lora_id: str | None, own_extra: str | None, activated_from: int | None = None) -> str | None:
    """The extra key of a request in SGLang: its adapter (None: the base model) and what the client sent as its own.

    activated_from  first token that is computed with the adapter, where that is an activated one

    Other arguments give other keys, whatever the strings hold, except that an empty ``own_extra`` is none.
    """
    if lora_id is None:
        return f":{own_extra}" if own_extra else None
    activated = "" if activated_from is None else f"@{activated_from}"
    return f"{len(lora_id)}{activated}:{lora_id}{own_extra or ''}"


def split_key(extra_key: str | None) -> tuple[str | None, str | None, int | None]:
    """What ``request_key`` joined. ``ValueError`` for a string that it did not make."""
    if extra_key is None:
        return None, None, None
    lengths, _, rest = extra_key.partition(":")
    length, _, position = lengths.partition("@")
    size, activated_from = _number(length), _number(position)
    parts = (rest[: size or 0] if lengths else None, rest[size or 0 :] or None, activated_from)
    if request_key(*parts) != extra_key:
        raise ValueError(f"{extra_key!r} is no extra key of a request")
    return parts


def _number(digits: str) -> int | None:
    return int(digits) if digits.isdecimal() and len(digits) < 10 else None


def are_token_ids(tokens: array[int]) -> bool:
    """Whether all are in [0, 2**32): others are no ids of any vocabulary and could be taken for salted ones."""
    return bool(np.maximum.reduce(np.frombuffer(tokens, np.uint64), initial=0) < 1 << TOKEN_BITS)


def leading_ids(tokens: array[int]) -> array[int]:
    """``tokens`` up to the first one that is no id of any vocabulary."""
    wrong = np.frombuffer(tokens, np.uint64) >= 1 << TOKEN_BITS
    return tokens[: int(wrong.argmax())] if wrong.any() else tokens


def salted_tokens(tokens: array[int], own_extra: str | None, cache_salt: str | None) -> array[int]:
    """Tokens of a request behind its adapter's marks: as they are, or with a hash of its extra key and salt above them.

    tokens  ids, for which ``are_token_ids`` holds

    So KV of different salts stands apart behind one copy of the adapter's weights. Which bits of the hash a token
    gets depends on its place only: a longer key begins as a shorter one.
    """
    if not own_extra and not cache_salt:
        return tokens
    own_extra = own_extra or ""
    text = f"sglang-blocklora-salt-v1\0{len(own_extra)}:{own_extra}{cache_salt or ''}"
    words = np.frombuffer(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "<u4")
    salts = (words & ((1 << _SALT_BITS) - 1)).astype(np.int64) << TOKEN_BITS | SALTED
    rows = -(-len(tokens) // len(salts))
    salted = np.zeros((rows, len(salts)), np.int64)
    salted.reshape(-1)[: len(tokens)] = np.frombuffer(tokens, np.int64)
    salted |= salts
    return array("q", salted.tobytes()[: 8 * len(tokens)])


def activated_tokens(tokens: array[int], activated_from: int, number: int) -> array[int]:
    """Tokens of a request with an activated adapter: the base model's, and from the invocation on the adapter's own.

    tokens  ids, for which ``are_token_ids`` holds
    number  of the adapter's contents, in [0, 2**30), which no other contents have
    """
    own = np.frombuffer(tokens, np.int64).copy()
    own[activated_from:] |= number << TOKEN_BITS | SALTED
    return array("q", own.tobytes())


def marks(slots: int) -> array[int]:
    """Keys (int64) of an adapter's ``slots`` slots, which stand first in its namespace and nowhere else."""
    return array("q", range(slots))
