"""Keeps work in order that several ask for at once, and never leaves it half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


class Turns:
    """At most one holder at a time for a key, in the order of asking. For one event loop.

    Nothing is kept of a key that nobody holds or waits for.
    """

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._askers: dict[str, int] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Wait for the turn of ``key`` and hold it inside the block."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._askers[key] = self._askers.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._askers[key] -= 1
            if not self._askers[key]:
                del self._askers[key], self._locks[key]


class Tasks:
    """Tasks that run to their end whoever asked for them goes away. For one event loop."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[None, None, Result]) -> asyncio.Task[Result]:
        """A task of ``work``, kept until it is done. Who awaits it shields it: ``await asyncio.shield(task)``."""
        task = asyncio.ensure_future(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, so that a task whose asker went is not reported as forgotten
