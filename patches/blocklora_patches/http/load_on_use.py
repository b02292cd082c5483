"""Loads an adapter when a request first names it, with ``--adapter-dir`` (``managers/tokenizer_manager.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.folders import NO_FOLDERS, AdapterFolders
from sglang_blocklora.naming.model_names import known_adapters
from sglang_blocklora.naming.single_flight import SingleFlight
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process


def adapter_folders() -> AdapterFolders:
    """Where adapters are that no request has named yet."""
    settings = Settings.active()
    return settings.adapter_folders if settings else NO_FOLDERS


def loaded_adapters(tokenizer_manager: Any) -> dict[str, Any]:
    """Name -> ``LoRARef`` of adapters that are loaded, or were until ``--max-loaded-loras`` put them out."""
    return {**tokenizer_manager.lora_ref_cache, **tokenizer_manager.lora_registry.get_all_adapters()}


async def _resolve_lora_path(original: Any, self: Any, obj: Any) -> None:
    names = {obj.lora_path} if isinstance(obj.lora_path, str) else {name for name in obj.lora_path if name}
    for name in sorted(names - self.lora_registry.get_all_adapters().keys()):
        await _load(self, name)
    await original(self, obj)


async def _load(manager: Any, name: str) -> None:
    """Load ``name``, however many requests ask for it at once. ``ValueError``, which becomes a 400, if it cannot be."""
    ref = manager.lora_ref_cache.get(name)
    path = ref.lora_path if ref and Path(ref.lora_path).is_dir() else adapter_folders().find(name)
    if path is None:
        known = known_adapters(loaded_adapters(manager), adapter_folders())
        raise ValueError(f"The adapter '{name}' does not exist. {known}")

    async def load() -> str | None:
        if name in manager.lora_registry.get_all_adapters():
            return None
        request = LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(path), pinned=bool(ref and ref.pinned))
        result = await manager.load_lora_adapter(request)
        return None if result.success else result.error_message

    loads = manager.__dict__.setdefault("blocklora_loads", SingleFlight())
    error = await loads.run(name, load)
    if error is not None and name not in manager.lora_registry.get_all_adapters():
        raise ValueError(error)


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._resolve_lora_path",
        _resolve_lora_path,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream loads what it knew once, as often as requests ask at the same time, and nothing else.",
        retire_when="upstream finds adapters by name, one load for all who ask",
    ),
)
