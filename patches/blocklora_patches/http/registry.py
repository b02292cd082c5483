"""Unloads an adapter when nothing uses it, and then for certain (``lora/lora_registry.py``).

Upstream counts users of an adapter and loses count: a request that is refused once it was counted (a prompt that is too
long, say) is never taken off, and one with n > 1 is taken off once too often. The next unload of that adapter then
waits for ever, and with it every load. What uses an adapter is read off the requests themselves here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process

POLL_SECONDS = 0.01
FORGET_SECONDS = 60  # long after upstream took the last request off an unloaded adapter's counter


def _init_lora(_: Any, self: Any) -> None:
    self.lora_registry.blocklora_requests = self.rid_to_state


def _handle_batch_request(self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream makes a state for each of n answers here and other ones later; these would stay for ever."""
    for rid in obj.rid[obj.batch_size :]:
        self.rid_to_state.pop(rid, None)


async def _acquire(original: Any, self: Any, lora_name: Any) -> Any:
    self.blocklora_acquiring = getattr(self, "blocklora_acquiring", 0) + 1
    try:
        return await original(self, lora_name)
    finally:
        self.blocklora_acquiring -= 1


async def _wait_for_unload(original: Any, self: Any, lora_id: str) -> None:
    # The counter stays for a while: upstream takes requests off it after their states are gone.
    while getattr(self, "blocklora_acquiring", 0) or any(
        state.obj.lora_id == lora_id for state in self.blocklora_requests.values()
    ):
        await asyncio.sleep(POLL_SECONDS)
    asyncio.get_running_loop().call_later(FORGET_SECONDS, self._counters.pop, lora_id, None)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_REGISTRY = "sglang.srt.lora.lora_registry.LoRARegistry"
HOOKS = (
    Hook(
        f"{_MANAGER}.init_lora",
        _init_lora,
        HookType.AFTER,
        process=Process.HTTP,
        why="The registry learns where requests are kept.",
        retire_when="upstream's count of an adapter's requests is right",
    ),
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
        why="A request in there has its adapter's id a moment later.",
        retire_when="upstream's count of an adapter's requests is right",
    ),
    Hook(
        f"{_REGISTRY}.wait_for_unload",
        _wait_for_unload,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream loses count of an adapter's requests, and would wait for ever.",
        retire_when="upstream's count of an adapter's requests is right",
    ),
)
