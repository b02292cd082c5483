"""Runs an action once for all who ask for it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class SingleFlight:
    """At most one run at a time for a key. Who asks meanwhile gets the same outcome; afterwards it runs anew.

    An asker that is cancelled does not cancel the run. For one event loop.
    """

    def __init__(self) -> None:
        self._running: dict[str, asyncio.Future[Any]] = {}

    async def run(self, key: str, start: Callable[[], Awaitable[Any]]) -> Any:
        """The outcome of ``start()``, or of the run for ``key`` that is under way."""
        running = self._running.get(key)
        if running is None or running.done():  # done: whoever asks now wants what is true now
            running = self._running[key] = asyncio.ensure_future(start())
            running.add_done_callback(lambda done: self._finished(key, done))
        return await asyncio.shield(running)

    def _finished(self, key: str, done: asyncio.Future[Any]) -> None:
        if self._running.get(key) is done:
            del self._running[key]
        if not done.cancelled():
            done.exception()  # looked at, so that a run whose askers all went is not reported as forgotten
