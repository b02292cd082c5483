"""The state that trainers and samplers of a run share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from blocklora_testing.rollouts.ledger import Ledger
from blocklora_testing.soak.client import Client
from blocklora_testing.soak.tally import Tally
from blocklora_testing.soak.world import World


@dataclass(frozen=True, kw_only=True)
class Size:
    """updates   of all names together
    contents  that the names take turns in
    samplers  clients that always have a request under way
    gap_s     a trainer rests for no longer than this between two updates
    settle_s  after which the processes' memory must be level
    """

    updates: int
    contents: int
    prompts: int
    samplers: int
    gap_s: float
    settle_s: float


@dataclass(kw_only=True)
class Run:
    """``pauses``: one trainer at a time pauses the server."""

    size: Size
    world: World
    client: Client
    names: Sequence[str]
    seed: int
    ledger: Ledger = field(default_factory=Ledger)
    tally: Tally = field(default_factory=Tally)
    pauses: asyncio.Lock = field(default_factory=asyncio.Lock)
    over: bool = False
    _begun: int = 0

    def take_update(self) -> bool:
        """Whether another update is to be made."""
        self._begun += 1
        return self._begun <= self.size.updates
