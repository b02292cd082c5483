"""``entrypoints/openai/serving_base.py``: ``model`` names an adapter, and an unknown name is a 404."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel, resolve_model

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.load_on_use import adapter_folders, loaded_adapters

AdapterNames = str | list[str | None] | None


def adapter_of_model(tokenizer_manager: Any, model: str | None) -> str | None:
    """The adapter that an OpenAI request's ``model`` asks for, None for the base model; ``UnknownModel`` otherwise."""
    base, loaded = tokenizer_manager.served_model_name, loaded_adapters(tokenizer_manager)
    return resolve_model(model or DEFAULT_MODEL_NAME, base, DEFAULT_MODEL_NAME, loaded, adapter_folders())


def _resolve_lora_path(original: Any, self: Any, request_model: str, explicit_lora_path: AdapterNames) -> AdapterNames:
    try:
        adapter = adapter_of_model(self.tokenizer_manager, request_model)
    except UnknownModel as error:
        raise HTTPException(status_code=404, detail=str(error)) from error
    return explicit_lora_path if adapter is None else adapter


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase._resolve_lora_path",
        _resolve_lora_path,
        HookType.AROUND,
        process=Process.HTTP,
        why="Stock SGLang answers an unknown model with the base model in silence.",
        retire_when="upstream refuses it",
    ),
)
