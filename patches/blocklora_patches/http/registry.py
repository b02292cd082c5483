"""Tells adapters by name, and what uses them, which is read off the requests; nothing is counted.

Upstream counts users of an adapter and loses count: a request that is refused once it was counted (a prompt that is too
long, say) is never taken off, and one with n > 1 is taken off once too often. The next unload of that adapter then
waits for ever. Names and requests change without a pause in between here, so nothing comes between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry

POLL_SECONDS = 0.05


class RequestsInFlight:
    """The requests of a tokenizer manager, by the adapter that they use."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._poll: asyncio.Task[None] | None = None
        self._batches: dict[int, Any] = {}  # id -> a batch of requests

    def adapters(self) -> set[str | None]:
        """``lora_id`` of every adapter in use; None for the base model."""
        in_use = {state.obj.lora_id for state in self._manager.rid_to_state.values()}
        for batch in self._batches.values():
            in_use.update(batch.lora_id or ())
        return in_use

    @contextmanager
    def batch(self, requests: Any) -> Iterator[None]:
        """Within it all adapters of a batch are in use.

        Upstream takes away what it knows of a batch before it makes, one by one, what it knows of their n answers.
        """
        self._batches[id(requests)] = requests
        try:
            yield
        finally:
            del self._batches[id(requests)]

    async def ended(self, lora_id: str) -> None:
        """Wait until no request uses the adapter, whose name nobody can find any more."""
        if lora_id not in self.adapters():
            return
        last = self._waiting[lora_id] = asyncio.get_running_loop().create_future()
        if self._poll is None:
            self._poll = asyncio.ensure_future(self._look())
        await last

    async def _look(self) -> None:
        """One look at all requests for all adapters that are waited for."""
        while self._waiting:
            in_use = self.adapters()
            for lora_id in self._waiting.keys() - in_use:
                self._waiting.pop(lora_id).set_result(None)
            await asyncio.sleep(POLL_SECONDS)
        self._poll = None


class AdapterRegistry(LoRARegistry):
    """SGLang's ids of adapters by name, without a pause between looking one up and the request's bearing it."""

    def add(self, ref: LoRARef) -> None:
        """Give a loaded adapter its name, at once: nothing is awaited."""
        self._register_adapter(ref)

    def remove(self, ref: LoRARef) -> None:
        """Take the name of a loaded adapter away, at once: nothing is awaited."""
        del self._registry[ref.lora_name]
        del self._counters[ref.lora_id]

    async def acquire(self, lora_name: str | list[str | None]) -> Any:
        """The id of an adapter, or of each in a list."""
        if isinstance(lora_name, str):
            return self._lora_id(lora_name)
        return [self._lora_id(name) for name in lora_name]

    def _lora_id(self, name: str | None) -> str | None:
        if name is None:
            return None
        if name not in self._registry:
            raise ValueError(f"The adapter '{name}' is not loaded.")
        self._registry.move_to_end(name)
        lora_id: str = self._registry[name].lora_id
        return lora_id

    async def release(self, lora_id: Any) -> None:
        """Nothing was counted."""
