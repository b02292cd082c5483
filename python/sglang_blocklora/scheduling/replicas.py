"""Chooses the replica of a request: the one that holds its adapter, unless that has too much to do.

Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, arXiv 1608.01350): of m requests in flight on n
replicas none gets more than ceil(balance * m / n). Each adapter prefers replicas in an order of its own, by rendezvous
hashing (Thaler, Ravishankar 1998), so that what one replica has no room for spreads over all others.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from fractions import Fraction
from typing import TypeVar

# A number within a server, a URL in a fleet.
Name = TypeVar("Name", int, str)
BALANCE = Fraction(5, 4)
# So few requests share a batch at little cost: an adapter's requests stay together up to here.
ALWAYS_ROOM = 8


def choose_replica(adapter: str | None, loads: Mapping[Name, int]) -> Name:
    """The name of the replica for one more request.

    adapter  its name, None for the base model, which every replica holds: it goes to the least loaded
    loads    requests in flight on each replica, of which there is at least one
    An adapter's order of the replicas follows from their names: one that comes or goes leaves that of the others alone.
    """
    if adapter is None:
        return min(loads, key=lambda replica: loads[replica])
    most = capacity(sum(loads.values()) + 1, len(loads))
    order: tuple[Name, ...] = preference(adapter, tuple(loads))
    return next(replica for replica in order if loads[replica] < most)


def capacity(requests: int, replicas: int) -> int:
    """The most requests that one of ``replicas`` may have when there are ``requests`` altogether."""
    return max(ALWAYS_ROOM, -(-requests * BALANCE.numerator // (replicas * BALANCE.denominator)))


@functools.lru_cache(maxsize=65536)
def preference(adapter: str, replicas: tuple[Name, ...]) -> tuple[Name, ...]:
    """All replicas, in the order in which ``adapter`` prefers them: the same in every process and release."""

    def weight(replica: Name) -> bytes:
        return hashlib.sha256(f"{replica}\0{adapter}".encode(errors="surrogatepass")).digest()

    return tuple(sorted(replicas, key=weight))
