"""The replicas of a fleet: which of them answer, what each has to do, and what each still has to load."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from sglang_blocklora.scheduling.replicas import choose_replica

logger = logging.getLogger(__name__)


class Load(msgspec.Struct, frozen=True):
    """The body of ``/v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    pinned: bool = False
    load_inplace: bool = False


class NoReplica(LookupError):
    """No replica can answer a request now."""


@dataclass(eq=False)
class Replica:
    """A server at ``url``.

    up         it answered its last check, and nobody was refused a connection since
    in_flight  requests that it has of this front
    why_down   what was told of it last, while it is down
    owed       names of adapters that it does not have, or lack, as the others do
    """

    url: str
    up: bool = False
    in_flight: int = 0
    why_down: str = ""
    owed: set[str] = field(default_factory=set)


class Fleet:
    """All replicas, and the adapters that were loaded on them through this front. For one event loop.

    base    the served name of their base model; empty until a replica told it
    wanted  adapters by name, as every replica has to have them
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.replicas = [Replica(url) for url in urls]
        self.base = ""
        self.wanted: dict[str, Load] = {}

    @property
    def up(self) -> list[Replica]:
        """The replicas that answer."""
        return [replica for replica in self.replicas if replica.up]

    def choose(self, adapter: str | None, tried: Collection[Replica] = ()) -> Replica:
        """Where the next request for ``adapter`` goes, other than to those that were ``tried``.

        ``NoReplica`` where nobody is left that answers and has the adapter as it was last loaded.
        """
        able = {one.url: one for one in self.up if one not in tried and adapter not in one.owed}
        if not able:
            raise NoReplica(f"No replica can answer now: of {len(self.replicas)} are {len(self.up)} up.")
        return able[choose_replica(adapter, {url: one.in_flight for url, one in able.items()})]

    @contextmanager
    def counted(self, replica: Replica) -> Iterator[None]:
        """A request is in flight on ``replica`` for the length of the block."""
        replica.in_flight += 1
        try:
            yield
        finally:
            replica.in_flight -= 1

    def lost(self, replica: Replica, why: str) -> None:
        """It does not answer. When it does again it may have been started anew, with nothing loaded."""
        if replica.up or replica.why_down != why:
            logger.warning("Replica %s is down: %s", replica.url, why)
        replica.up, replica.why_down = False, why
        replica.owed |= self.wanted.keys()

    def found(self, replica: Replica) -> None:
        """It answers."""
        if not replica.up:
            logger.info("Replica %s is up.", replica.url)
        replica.up, replica.why_down = True, ""
