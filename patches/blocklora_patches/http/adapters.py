"""Makes unloading last, and keeps an adapter's last error (``managers/tokenizer_manager.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqOutput
from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.load_on_use import adapter_folders
from blocklora_patches.http.replicas import load, unload


async def _unload_lora_adapter(original: Any, self: Any, obj: Any, _: Any = None) -> Any:
    # Forgotten first: a request that names it while its last ones run must not load it again.
    ref = self.lora_ref_cache.pop(obj.lora_name, None)
    loaded = {**self.lora_registry.get_all_adapters(), **self.pending_lora_unloads}
    if ref is not None and obj.lora_name not in loaded:  # --max-loaded-loras put it out already
        result = UnloadLoRAAdapterReqOutput(success=True, loaded_adapters={})
    else:
        result = await unload(original, self, obj)
    if result.success:
        adapter_errors(self).pop(obj.lora_name, None)
    elif ref is not None:
        self.lora_ref_cache.setdefault(obj.lora_name, ref)
    return result


async def _load_lora_adapter(original: Any, self: Any, obj: Any, _: Any = None) -> Any:
    result = await load(original, self, obj)
    errors = adapter_errors(self)
    if result.success:
        errors.pop(obj.lora_name, None)
    elif obj.lora_name in self.lora_ref_cache or adapter_folders().find(obj.lora_name):
        errors[obj.lora_name] = result.error_message
    return result


def adapter_errors(tokenizer_manager: Any) -> dict[str, str]:
    """Name of a known adapter -> what last went wrong with it."""
    errors: dict[str, str] = tokenizer_manager.__dict__.setdefault("blocklora_errors", {})
    return errors


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.load_lora_adapter",
        _load_lora_adapter,
        HookType.AROUND,
        process=Process.HTTP,
        why="GET /adapters tells what last went wrong with an adapter, and replicas load too.",
        retire_when="upstream keeps the error and loads with data parallel replicas",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.unload_lora_adapter",
        _unload_lora_adapter,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream loads an unloaded adapter again when a request names it, so /unload_lora_adapter had "
        "no lasting effect.",
        retire_when="upstream forgets adapters that a user unloads",
    ),
)
