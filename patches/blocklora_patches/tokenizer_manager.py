"""``managers/tokenizer_manager.py``: an adapter that was unloaded on request stays unloaded."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hook import Hook


async def _unload_lora_adapter(original: Any, self: Any, obj: Any, _: Any = None) -> Any:
    result = await original(self, obj, _)
    if result.success:
        self.lora_ref_cache.pop(obj.lora_name, None)
    return result


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter",
        _unload_lora_adapter,
        HookType.AROUND,
        "Upstream loads an unloaded adapter again when a request names it, so /unload_lora_adapter had no lasting "
        "effect. Goes when upstream forgets adapters that a user unloads.",
    ),
)
