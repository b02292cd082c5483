"""Sends the loads and unloads of every way in through ``Adapters`` (``managers/tokenizer_manager.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.managers.io_struct import LoRAUpdateOutput
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import known_adapters, reason_not_to_name

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http import permission
from blocklora_patches.http.adapters import Adapters, NotLoaded, adapters_of


def _init_lora(_: Any, self: Any) -> None:
    self.blocklora_adapters = Adapters(self)
    for name in self.lora_ref_cache:
        problem = reason_not_to_name(name, self.served_model_name, DEFAULT_MODEL_NAME)
        if problem is not None:
            raise ValueError(f"--lora-paths: {problem}")


async def _load_lora_adapter(original: Any, self: Any, obj: Any, request: Any = None) -> LoRAUpdateOutput:
    self.auto_create_handle_loop()
    path = await permission.allowed_path(request, obj.lora_path)
    return await adapters_of(self).load(obj.lora_name, path, bool(obj.pinned))


async def _load_lora_adapter_from_tensors(original: Any, self: Any, obj: Any, request: Any = None) -> LoRAUpdateOutput:
    permission.check(request)
    message = (
        f"adapter {obj.lora_name!r}: loading from tensors is not served, because every TP rank would receive all bytes "
        "of the adapter. Save it as a PEFT folder and use /load_lora_adapter."
    )
    return LoRAUpdateOutput(success=False, error_message=message)


async def _unload_lora_adapter(original: Any, self: Any, obj: Any, request: Any = None) -> LoRAUpdateOutput:
    self.auto_create_handle_loop()
    permission.check(request)
    try:
        return await adapters_of(self).unload(obj.lora_name)
    except NotLoaded:
        loaded = adapters_of(self).loaded
        message = f"The adapter '{obj.lora_name}' is not loaded. {known_adapters(loaded, ())}"
        return LoRAUpdateOutput(success=False, error_message=message)


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = (
    Hook(
        f"{_MANAGER}.init_lora",
        _init_lora,
        HookType.AFTER,
        process=Process.HTTP,
        why="A place for what the hooks below keep; names of --lora-paths that no request could reach are refused.",
        retire_when="the hooks below are retired",
    ),
    Hook(
        f"{_MANAGER}.load_lora_adapter",
        _load_lora_adapter,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream loads one adapter at a time, takes any name, refuses replicas, and waits for the requests of "
        "what --max-loaded-loras puts out.",
        retire_when="upstream holds nothing global while it loads, and checks names",
    ),
    Hook(
        f"{_MANAGER}.load_lora_adapter_from_tensors",
        _load_lora_adapter_from_tensors,
        HookType.AROUND,
        process=Process.HTTP,
        why="Every TP rank would receive all bytes of the adapter.",
        retire_when="a rank's part of an adapter can be sent to that rank",
    ),
    Hook(
        f"{_MANAGER}.unload_lora_adapter",
        _unload_lora_adapter,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream holds up every other load and unload until the last request of the adapter has ended, loads it "
        "again when a request names it, and refuses replicas.",
        retire_when="upstream holds nothing global while it waits, and forgets adapters that a user unloads",
    ),
)
