"""Answers Ollama's routes, whose ``model`` may name an adapter, with refusals in Ollama's form.

SGLang's handlers (``entrypoints/ollama/serving.py``) answer every model with the base model, and refusals with a 500.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest, OllamaShowRequest
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang_blocklora.naming.model_names import UnknownModel

from blocklora_patches.http.endpoints import replace
from blocklora_patches.http.load_on_use import loaded_adapters
from blocklora_patches.http.model_names import adapter_of_model

LATEST = ":latest"  # the tag that Ollama's clients add to a name without one


class Answering:
    """The tokenizer manager as ``OllamaServing`` sees it: it goes by the name of who answers, and asks them.

    adapter  None: the base model
    """

    def __init__(self, tokenizer_manager: Any, adapter: str | None) -> None:
        self._manager = tokenizer_manager
        self._adapter = adapter
        self.served_model_name = adapter or tokenizer_manager.served_model_name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def generate_request(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        """SGLang's, for the adapter."""
        obj.lora_path = self._adapter
        if isinstance(obj.input_ids, Mapping):  # transformers 5 makes more of a chat than its ids
            obj.input_ids = obj.input_ids["input_ids"]
        answers: AsyncIterator[Any] = self._manager.generate_request(obj, request)
        return answers


class OllamaRoutes:
    """Ollama's endpoints, over SGLang's tokenizer manager."""

    def __init__(self, tokenizer_manager: Any) -> None:
        self._manager = tokenizer_manager

    async def chat(self, request: OllamaChatRequest, raw_request: Request) -> Any:
        """One message after a conversation."""
        if not request.messages:
            return _refusal("messages is empty", 400)
        return await self._answer(request.model, lambda serving: serving.handle_chat(request, raw_request))

    async def generate(self, request: OllamaGenerateRequest, raw_request: Request) -> Any:
        """The text after a prompt."""
        return await self._answer(request.model, lambda serving: serving.handle_generate(request, raw_request))

    async def _answer(self, model: str, ask: Callable[[OllamaServing], Awaitable[Any]]) -> Any:
        try:
            adapter = await self._adapter_of(model)
            answer = await ask(OllamaServing(Answering(self._manager, adapter)))
        except UnknownModel as error:
            return _refusal(str(error), error.status_code)
        except (ValueError, TemplateError) as error:  # the latter: of a chat that the model's template refuses
            return _refusal(str(error), 400)
        if isinstance(answer, StreamingResponse):
            answer.body_iterator = _told(answer.body_iterator)
        return answer

    async def _adapter_of(self, model: str) -> str | None:
        try:
            return await adapter_of_model(self._manager, model)
        except UnknownModel:
            if not model.endswith(LATEST):
                raise
            return await adapter_of_model(self._manager, model.removesuffix(LATEST))

    async def tags(self) -> Any:
        """The base model and loaded adapters."""
        tags = OllamaServing(self._manager).get_tags()
        (base,) = tags.models
        names = sorted(loaded_adapters(self._manager))
        tags.models += [base.model_copy(update={"name": name, "model": name}) for name in names]
        return tags

    async def show(self, request: OllamaShowRequest) -> Any:
        """One of what ``tags`` lists."""
        model, known = request.model, {self._manager.served_model_name, *loaded_adapters(self._manager)}
        if model not in known and model.removesuffix(LATEST) not in known:
            return _refusal(f"model '{model}' not found. Known: {', '.join(sorted(known))}.", 404)
        return OllamaServing(self._manager).get_show(model)

    def add_to(self, app: FastAPI) -> None:
        """Answer in the place of SGLang's endpoints."""
        replace(app, http_server.ollama_chat, self.chat)
        replace(app, http_server.ollama_generate, self.generate)
        replace(app, http_server.ollama_tags, self.tags)
        replace(app, http_server.ollama_show, self.show)


async def _told(lines: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A stream that has begun tells a refusal as its last line."""
    try:
        async for line in lines:
            yield line
    except ValueError as error:
        yield msgspec.json.encode({"error": str(error)}) + b"\n"


def _refusal(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)
