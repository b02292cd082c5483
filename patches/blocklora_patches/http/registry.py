"""Reads what uses an adapter off the requests themselves; nothing is counted (``lora/lora_registry.py``).

Upstream counts users of an adapter and loses count: a request that is refused once it was counted (a prompt that is too
long, say) is never taken off, and one with n > 1 is taken off once too often. The next unload of that adapter then
waits for ever. Names and requests change without a pause in between here, so nothing comes between the two.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process

POLL_SECONDS = 0.05


class RequestsInFlight:
    """The requests of a tokenizer manager, by the adapter that they use."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._poll: asyncio.Task[None] | None = None

    def adapters(self) -> set[str | None]:
        """``lora_id`` of every adapter in use; None for the base model."""
        return {state.obj.lora_id for state in self._manager.rid_to_state.values()}

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


def remove(registry: Any, ref: LoRARef) -> None:
    """Take the name of a loaded adapter away, at once: nothing is awaited."""
    del registry._registry[ref.lora_name]
    del registry._counters[ref.lora_id]


def _handle_batch_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream makes a state for each of n answers here and other ones later; these would stay for ever."""
    for rid in obj.rid[obj.batch_size :]:
        self.rid_to_state.pop(rid, None)


async def _acquire(original: Any, self: Any, lora_name: str | list[str | None]) -> Any:
    if isinstance(lora_name, str):
        return _lora_id(self, lora_name)
    return [_lora_id(self, name) for name in lora_name]


def _lora_id(registry: Any, name: str | None) -> str | None:
    if name is None:
        return None
    if name not in registry._registry:
        raise ValueError(f"The adapter '{name}' is not loaded.")
    registry._registry.move_to_end(name)
    return registry._registry[name].lora_id


async def _release(original: Any, self: Any, lora_id: Any) -> None:
    """Nothing was counted."""


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_REGISTRY = "sglang.srt.lora.lora_registry.LoRARegistry"
HOOKS = (
    Hook(
        f"{_MANAGER}._handle_batch_request",
        _handle_batch_request,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Upstream makes a state for each of n answers that nothing ever removes.",
        retire_when="upstream drops them",
    ),
    Hook(
        f"{_REGISTRY}.acquire",
        _acquire,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream pauses between looking an adapter up and the request's bearing its id: an unload would miss it.",
        retire_when="upstream's count of an adapter's requests is right",
    ),
    Hook(
        f"{_REGISTRY}.release",
        _release,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream takes requests off a count that is not kept.",
        retire_when="upstream's count of an adapter's requests is right",
    ),
)
