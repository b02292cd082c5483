"""Asks the schedulers for facts, so that each answer reaches who asked (``managers/communicator.py``).

SGLang's channels to the scheduler have no request ids: whoever waits takes the next answer. So a call that was sent is
waited for to its end, whatever becomes of its asker.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

import msgspec
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.turns import Tasks
from sglang_blocklora.reporting.facts import Facts
from sglang_blocklora.reporting.replicas import merge_replicas

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.scheduler.control import FACTS

_calls = Tasks()


async def _call(original: Any, self: Any, obj: Any) -> Any:
    return await asyncio.shield(_calls.start(original(self, obj)))


class SchedulerFacts:
    """Facts that the schedulers tell of their adapters, and the last that they told."""

    def __init__(self, ask: Callable[[], Awaitable[list[dict[str, Any]]]]) -> None:
        self._ask = ask
        self._asking: asyncio.Future[Facts] | None = None
        self._told_at = 0.0
        self.last: Facts | None = None

    async def now(self) -> Facts:
        """Facts of all replicas together, as they are at some moment after this call."""
        replicas = await self._ask()
        self.last = merge_replicas([msgspec.convert(state[FACTS], Facts) for state in replicas])
        self._told_at = time.monotonic()
        return self.last

    async def within(self, seconds: float) -> Facts | None:
        """New facts, or the last ones where the schedulers are busy for longer; None if there were never any.

        One question at a time is on its way for all who ask here, and nobody who goes takes it back.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self.now())
        await asyncio.wait({self._asking}, timeout=seconds)
        if self._asking.done():
            return self._asking.result()
        return self.last

    @property
    def age_seconds(self) -> float:
        """How long ago ``last`` was told."""
        return time.monotonic() - self._told_at


@lru_cache(maxsize=1)
def facts_of(tokenizer_manager: Any) -> SchedulerFacts:
    """The process's one ``SchedulerFacts``."""
    return SchedulerFacts(tokenizer_manager.get_internal_state)


HOOKS = (
    Hook(
        "sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        _call,
        HookType.AROUND,
        process=Process.HTTP,
        why="A cancelled call leaves its answers to the next caller.",
        retire_when="upstream's answers carry the id of their question",
    ),
)
