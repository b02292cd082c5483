"""Keeps values in host memory within a byte budget; the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Held = TypeVar("Held")


class HostTier(Generic[Held]):
    """Values by key within the budget. Which go depends only on the order of calls and on the sizes callers give.

    TP ranks give sizes they agreed on, so all of them hold the same keys.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[str, tuple[int, Held]] = OrderedDict()  # least recently used first

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def peek(self, key: str) -> Held | None:
        """What is held under ``key``, which does not count as a use."""
        return self._entries[key][1] if key in self._entries else None

    def get(self, key: str) -> Held | None:
        """What is held under ``key``, now the most recently used, or None."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][1]

    def put(self, key: str, size_bytes: int, value: Held) -> list[str]:
        """Hold ``value``, in the place of what the key held; returns the keys that gave way.

        What is larger than the whole budget is not held, and nothing gives way to it.
        """
        self.remove(key)
        if size_bytes > self.budget_bytes:
            return []
        gone = []
        while self.used_bytes + size_bytes > self.budget_bytes:
            gone.append(next(iter(self._entries)))
            self.remove(gone[-1])
        self._entries[key] = (size_bytes, value)
        self.used_bytes += size_bytes
        return gone

    def remove(self, key: str) -> None:
        """Let go of what ``key`` holds, if anything."""
        if key in self._entries:
            self.used_bytes -= self._entries.pop(key)[0]
