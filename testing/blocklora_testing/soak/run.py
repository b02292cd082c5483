"""The state that all parts of a run share, and how an answer is judged."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from blocklora_testing.soak.client import Answer, Client, NoAnswer
from blocklora_testing.soak.ledger import Ledger
from blocklora_testing.soak.place import Place
from blocklora_testing.soak.tally import Tally
from blocklora_testing.soak.world import World

SERVED = "soak-base"
REFUSED = (400, 404)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request: an adapter's name or None, index of its prompt, tokens wanted."""

    name: str | None
    prompt: int
    tokens: int


@dataclass(kw_only=True)
class Run:
    """world, place    what is served, and from where
    ledger, tally      what may be answered, and what was
    popular            names that requests may be sent to, the most popular first
    pool_tokens        slots of the KV pool: no longer prompt can ever run
    locks              who holds a name's lock may change its folder and what it means
    """

    world: World
    place: Place
    client: Client
    seed: int
    popular: Sequence[str]
    pool_tokens: int
    ledger: Ledger = field(default_factory=Ledger)
    tally: Tally = field(default_factory=Tally)
    locks: dict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    over: asyncio.Event = field(default_factory=asyncio.Event)
    _open: asyncio.Event = field(default_factory=asyncio.Event)
    _inside: int = 0

    def __post_init__(self) -> None:
        self._open.set()

    def rng(self, who: str) -> Random:
        """Random numbers of one part of the run, whatever the others do."""
        return Random(f"{self.seed}/{who}")

    def name(self, rng: Random) -> str | None:
        """Few names are asked for often and many seldom; every tenth request is the base model's."""
        if rng.random() < 0.1:
            return None
        return self.popular[int(len(self.popular) * rng.random() ** 2.5)]

    def asked(self, rng: Random) -> Asked:
        world = self.world
        return Asked(name=self.name(rng), prompt=rng.randrange(world.long), tokens=rng.randint(1, 4))

    @contextlib.asynccontextmanager
    async def going(self) -> AsyncIterator[None]:
        """For each request: none is under way while it is quiet."""
        await self._open.wait()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nobody sends anything until all that was sent is answered, and then the caller alone."""
        self._open.clear()
        try:
            while self._inside:
                await asyncio.sleep(0.01)
            yield
        finally:
            self._open.set()

    async def forever(self, kind: str, rng: Random, step: Any) -> None:
        """``step(rng)`` again and again until the run is over; a request that hangs is a problem of ``kind``."""
        while not self.over.is_set():
            async with self.going():
                try:
                    await step(rng)
                except NoAnswer as error:
                    self.tally.problem(kind, str(error))
                    await asyncio.sleep(1)  # the server may have ended
                except (LookupError, TypeError) as error:
                    self.tally.problem(kind, f"an answer of another form: {traceback.format_exc()[-600:]}{error!r}")

    def judge(
        self,
        kind: str,
        asked: Asked,
        answer: Answer,
        found: Sequence[int] | str,
        ended: str | None,
        aborted: bool = False,
    ) -> None:
        """Count an answer with status 200.

        found    tokens, or text
        ended    "abort" where it may be short
        aborted  whether its own client asked for that
        """
        possible: set[Any] = {None}
        if asked.name is not None:
            possible = set(self.ledger.possible(asked.name, answer.begin, answer.end))
        tokens = self._right(possible, asked.prompt, found)
        if tokens is None:
            who = self.world.who(asked.prompt, found) if not isinstance(found, str) else []
            by = f"; PEFT answers so with {', '.join(who) or 'nothing'}" if found else ""
            self.tally.problem(kind, f"{asked}: {found!r}, possible were {sorted(map(str, possible))}{by}")
        elif ended == "abort" or len(tokens) != asked.tokens:
            if aborted or self.ledger.stormy(answer.begin, answer.end):
                self.tally.aborted(kind)
            else:
                self.tally.problem(kind, f"{asked}: {len(tokens)} tokens, and nobody asked for an abort")
        else:
            self.tally.right(kind, answer.end - answer.begin)

    def _right(self, possible: set[Any], prompt: int, found: Sequence[int] | str) -> Sequence[int] | None:
        """The tokens that were found, or None where PEFT answers so with none of the contents that are possible."""
        for contents in possible:
            tokens = found if not isinstance(found, str) else self.world.tokens_of(contents, prompt, found)
            if tokens is not None and self.world.right(contents, prompt, tokens):
                return tokens
        return None

    def judge_refusal(self, kind: str, asked: Sequence[Asked], answer: Answer) -> None:
        """Count an answer that is an error, of one request or of some that were sent in one call."""
        names = [one.name for one in asked if one.name is not None]
        sure = all(self.ledger.must_answer(name, answer.begin, answer.end) for name in names)
        if answer.status not in REFUSED or sure:
            self.tally.problem(kind, f"{asked}: {answer.status} {str(answer.body)[:300]}")
        else:
            self.tally.refused(kind, answer.end - answer.begin, len(asked))
