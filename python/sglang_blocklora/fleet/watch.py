"""Looks after one replica: whether it answers, what it serves, and that it has the adapters it ought to have."""

from __future__ import annotations

import asyncio
import logging

import msgspec

from sglang_blocklora.fleet.calls import Calls, Gone, bearer
from sglang_blocklora.fleet.replicas import Replica
from sglang_blocklora.fleet.settings import RouteSettings
from sglang_blocklora.naming.turns import Turns

logger = logging.getLogger(__name__)

# SGLang answers a check with a 503 after 20 s in which its scheduler said nothing.
CHECK_SECONDS = 25.0


class NotOurs(Exception):
    """A replica answers, but cannot be used; the message says why and what to do."""


class _Card(msgspec.Struct):
    id: str
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class Watch:
    """Checks replicas, each in a task of its own.

    turns  of adapters' names, shared with the loads that clients ask for
    """

    def __init__(self, calls: Calls, settings: RouteSettings, turns: Turns) -> None:
        self._calls, self._fleet = calls, calls.fleet
        self._settings = settings
        self._turns = turns
        self._told: dict[tuple[str, str], str] = {}

    async def forever(self, replica: Replica) -> None:
        """Check ``replica`` until the task is cancelled."""
        while True:
            await self.check(replica)
            await asyncio.sleep(self._settings.check_seconds)

    async def check(self, replica: Replica) -> None:
        """Ask how it is once; give it what it is owed."""
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                answer = await self._calls.whole(replica, "GET", "/health", {})
                if not answer.ok:
                    raise Gone(f"/health answered with {answer.status}")
                if not replica.up:
                    await self._meet(replica)
        except (Gone, NotOurs, TimeoutError) as error:
            self._fleet.lost(replica, str(error) or f"no answer in {CHECK_SECONDS:g} s")
            return
        self._fleet.found(replica)
        for name in sorted(replica.owed):
            await self._settle(replica, name)

    async def _meet(self, replica: Replica) -> None:
        """Learn which base model it serves, which must be that of the others."""
        answer = await self._calls.whole(replica, "GET", "/v1/models", bearer(self._settings.api_key))
        if answer.status == 401:
            raise NotOurs("it asks for a key: give this front the replicas' --api-key")
        try:
            cards = msgspec.json.decode(answer.body, type=_Models).data
            base = next(card.id for card in cards if card.parent is None)
        except (msgspec.DecodeError, StopIteration):
            raise NotOurs(f"its /v1/models is none: {answer.status} {answer.body[:200]!r}") from None
        self._fleet.base = self._fleet.base or base
        if base != self._fleet.base:
            raise NotOurs(f"it serves {base}, the others {self._fleet.base}: see --served-model-name")

    async def _settle(self, replica: Replica, name: str) -> None:
        """Load or unload ``name`` on a replica that missed it. Where that fails, the next check tries again."""
        async with self._turns.of(name):
            if name not in replica.owed:
                return
            load = self._fleet.wanted.get(name)
            route = "/v1/load_lora_adapter" if load is not None else "/v1/unload_lora_adapter"
            # In place: it may have the adapter already, or an older version of it.
            body = msgspec.structs.replace(load, load_inplace=True) if load is not None else {"lora_name": name}
            headers = bearer(self._settings.managing_key) | {"Content-Type": "application/json"}
            try:
                answer = await self._calls.whole(replica, "POST", route, headers, msgspec.json.encode(body))
            except Gone:
                return  # the next check finds out
            if answer.ok or (load is None and answer.status == 404):
                replica.owed.remove(name)
            else:
                told = answer.body.decode(errors="replace")
                self._tell(replica, name, f"answered {route} with {answer.status}: {told}")

    def _tell(self, replica: Replica, name: str, text: str) -> None:
        """Once, not at every check."""
        if self._told.get((replica.url, name)) != text:
            self._told[replica.url, name] = text
            logger.error("Replica %s lacks adapter %r as the others have it, and %s", replica.url, name, text)
