"""Lets Ollama's ``model`` name an adapter, with refusals in Ollama's form (``entrypoints/ollama/serving.py``)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextvars import ContextVar
from typing import Any

import msgspec
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.load_on_use import loaded_adapters
from blocklora_patches.http.model_names import adapter_of_model

LATEST = ":latest"  # the tag that Ollama's clients add to a name without one
# The adapter of the request that this asyncio task serves: upstream drops it between the two functions below.
_adapter: ContextVar[str | None] = ContextVar("blocklora_ollama_adapter")


async def _handle(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    if getattr(request, "messages", None) == []:
        return _error("messages is empty", 400)
    try:
        _adapter.set(await _adapter_of(self.tokenizer_manager, request.model))
        return await original(self, request, raw_request)
    except UnknownModel as error:
        return _error(str(error), error.status_code)
    except (ValueError, TemplateError) as error:  # the latter: of a chat that the model's template refuses
        return _error(str(error), 400)


async def _adapter_of(tokenizer_manager: Any, model: str) -> str | None:
    try:
        return await adapter_of_model(tokenizer_manager, model)
    except UnknownModel:
        if not model.endswith(LATEST):
            raise
        return await adapter_of_model(tokenizer_manager, model.removesuffix(LATEST))


async def _answer(original: Any, self: Any, gen_request: Any, raw_request: Any, model_name: str) -> Any:
    gen_request.lora_path = _adapter.get()
    if isinstance(gen_request.input_ids, Mapping):  # transformers 5 makes more of a chat than its ids
        gen_request.input_ids = gen_request.input_ids["input_ids"]
    answer = await original(self, gen_request, raw_request, gen_request.lora_path or model_name)
    if gen_request.stream:
        answer.body_iterator = _told(answer.body_iterator)
    return answer


async def _told(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that has begun tells a refusal as its last line."""
    try:
        async for line in lines:
            yield line
    except ValueError as error:
        yield msgspec.json.encode({"error": str(error)}) + b"\n"


def _get_tags(result: Any, self: Any) -> None:
    (base,) = result.models
    names = sorted(loaded_adapters(self.tokenizer_manager))
    result.models += [base.model_copy(update={"name": name, "model": name}) for name in names]


def _get_show(original: Any, self: Any, model: str) -> Any:
    """Of what ``/api/tags`` lists: an adapter that is not loaded would have to be looked up, and nobody waits here."""
    manager = self.tokenizer_manager
    known = {manager.served_model_name, *loaded_adapters(manager)}
    if model not in known and model.removesuffix(LATEST) not in known:
        return _error(f"model '{model}' not found. Known: {', '.join(sorted(known))}.", 404)
    return original(self, model)


def _error(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _hook(method: str, handler: Any, kind: HookType) -> Hook:
    return Hook(
        f"sglang.srt.entrypoints.ollama.serving.OllamaServing.{method}",
        handler,
        kind,
        process=Process.HTTP,
        why="Upstream answers every model with the base model, and refusals with a 500.",
        retire_when="upstream's Ollama routes know adapters and refuse unknown models",
    )


HOOKS = (
    _hook("handle_chat", _handle, HookType.AROUND),
    _hook("handle_generate", _handle, HookType.AROUND),
    _hook("_generate_chat_response", _answer, HookType.AROUND),
    _hook("_stream_chat_response", _answer, HookType.AROUND),
    _hook("_generate_generate_response", _answer, HookType.AROUND),
    _hook("_stream_generate_response", _answer, HookType.AROUND),
    _hook("get_tags", _get_tags, HookType.AFTER),
    _hook("get_show", _get_show, HookType.AROUND),
)
