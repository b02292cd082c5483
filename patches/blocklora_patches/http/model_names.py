"""Lets ``model`` name an adapter, and answers an unknown one with a 404 (``entrypoints/openai/serving_base.py``).

What each route makes of ``model`` is listed in docs/api.md; ``test/contract/test_model_names.py`` knows every one.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME
from sglang.srt.entrypoints.openai.serving_classify import OpenAIServingClassify
from sglang.srt.entrypoints.openai.serving_decisions import OpenAIServingDecisions
from sglang.srt.entrypoints.openai.serving_score import OpenAIServingScore
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel, adapter_name, resolve_model

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.load_on_use import adapter_folders, find_folder, loaded_adapters

AdapterNames = str | list[str | None] | None
# Upstream gives their requests no adapter on their way. ``/v1/systemone`` is a kind of decisions.
BASE_ONLY = (OpenAIServingClassify, OpenAIServingDecisions, OpenAIServingScore)


class BaseModelOnly(ValueError):
    """A request named an adapter on a route that the base model answers alone."""

    def __init__(self, adapter: str) -> None:
        super().__init__(f"This route is answered by the base model only, not by the adapter '{adapter}'.")


async def adapter_of_model(tokenizer_manager: Any, model: str | None) -> str | None:
    """The adapter that an OpenAI request's ``model`` asks for, None for the base model.

    Raises ``UnknownModel`` where there is no such adapter, and ``NoAnswer`` where the file system does not tell.
    """
    model, base = model or DEFAULT_MODEL_NAME, tokenizer_manager.served_model_name
    name, known = adapter_name(model, base, DEFAULT_MODEL_NAME), loaded_adapters(tokenizer_manager)
    if name is not None and name not in known and await find_folder(tokenizer_manager, name) is not None:
        return name
    return resolve_model(model, base, DEFAULT_MODEL_NAME, known, adapter_folders().roots)


async def _handle_request(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    try:
        adapter = await adapter_of_model(self.tokenizer_manager, getattr(request, "model", None))
        if adapter is not None and isinstance(self, BASE_ONLY):
            raise BaseModelOnly(adapter)
    except UnknownModel as error:
        return self.create_error_response(
            str(error), err_type="NotFoundError", status_code=error.status_code, param="model"
        )
    except BaseModelOnly as error:
        return self.create_error_response(str(error), param="model")
    return await original(self, request, raw_request)


def _resolve_lora_path(original: Any, self: Any, request_model: str, explicit_lora_path: AdapterNames) -> AdapterNames:
    """Whether there is an adapter of that name was asked above, and is asked again when it is loaded or looked up."""
    base = self.tokenizer_manager.served_model_name
    name = adapter_name(request_model or DEFAULT_MODEL_NAME, base, DEFAULT_MODEL_NAME)
    return explicit_lora_path if name is None else name


async def _create_transcription(
    original: Any, self: Any, audio_data: bytes, model: str, *args: Any, **rest: Any
) -> Any:
    try:
        adapter = await adapter_of_model(self.tokenizer_manager, model)
    except UnknownModel as error:
        return self.create_error_response(
            str(error), err_type="NotFoundError", status_code=error.status_code, param="model"
        )
    if adapter is not None:
        return self.create_error_response(str(BaseModelOnly(adapter)), param="model")
    return await original(self, audio_data, model, *args, **rest)


_BASE = "sglang.srt.entrypoints.openai.serving_base.OpenAIServingBase"
HOOKS = (
    Hook(
        f"{_BASE}.handle_request",
        _handle_request,
        HookType.AROUND,
        process=Process.HTTP,
        why="Stock SGLang answers an unknown model with the base model in silence.",
        retire_when="upstream refuses it",
    ),
    Hook(
        f"{_BASE}._resolve_lora_path",
        _resolve_lora_path,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream knows no adapter by its name alone, and takes a name with a colon apart at the first one.",
        retire_when="upstream takes an adapter's name as the model",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_transcription.OpenAIServingTranscription.create_transcription",
        _create_transcription,
        HookType.AROUND,
        process=Process.HTTP,
        why="Stock SGLang answers an unknown model with the base model in silence.",
        retire_when="upstream refuses it",
    ),
)
