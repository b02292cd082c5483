"""Lets ``model`` name an adapter, on every route of SGLang that takes one; an unknown one is a 404.

An endpoint of SGLang (``entrypoints/http_server.py``) is asked once it is known who answers. What each route makes of
``model`` is listed in docs/api.md; ``test/contract/test_model_names.py`` knows every one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.openai.protocol import DEFAULT_MODEL_NAME, ErrorResponse
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel, adapter_name, resolve_model

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.door import detokenize
from blocklora_patches.http.endpoints import replace
from blocklora_patches.http.load_on_use import adapter_places, find_folder, loaded_adapters

# An API's form of a refusal, from its message and HTTP status.
Refusal = Callable[[str, int], JSONResponse]


async def adapter_of_model(tokenizer_manager: Any, model: str | None) -> str | None:
    """The adapter that a request's ``model`` asks for, None for the base model.

    Raises ``UnknownModel`` where there is no such adapter, and ``NoAnswer`` where the file system does not tell.
    """
    model, base = model or DEFAULT_MODEL_NAME, tokenizer_manager.served_model_name
    name, known = adapter_name(model, base, DEFAULT_MODEL_NAME), loaded_adapters(tokenizer_manager)
    if name is not None and name not in known and await find_folder(tokenizer_manager, name) is not None:
        return name
    return resolve_model(model, base, DEFAULT_MODEL_NAME, known, adapter_places())


def _openai(message: str, status: int) -> JSONResponse:
    kind = "BadRequestError" if status == 400 else "NotFoundError"
    body = ErrorResponse(message=message, type=kind, param="model", code=status)
    return JSONResponse(body.model_dump(), status)


def _openai_responses(message: str, status: int) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": "model", "code": status}
    return JSONResponse({"error": error}, status)


def _anthropic(message: str, status: int) -> JSONResponse:
    return JSONResponse({"type": "error", "error": {"type": "not_found_error", "message": message}}, status)


# Endpoint -> how its API refuses.
ANY_MODEL: dict[Callable[..., Any], Refusal] = {
    http_server.openai_v1_completions: _openai,
    http_server.openai_v1_chat_completions: _openai,
    http_server.sagemaker_chat_completions: _openai,
    http_server.openai_v1_embeddings: _openai,
    http_server.openai_v1_tokenize: _openai,
    detokenize: _openai,
    http_server.v1_responses_request: _openai_responses,
    http_server.anthropic_v1_messages: _anthropic,
    http_server.anthropic_v1_count_tokens: _anthropic,
}
# Upstream gives the requests of these no adapter on their way.
BASE_MODEL_ONLY: dict[Callable[..., Any], Refusal] = {
    http_server.openai_v1_classify: _openai,
    http_server.v1_score_request: _openai,
    http_server.v1_decisions_request: _openai,
    http_server.systemone_decisions: _openai,
    http_server.openai_v1_audio_transcriptions: _openai,
}


def add_to(app: FastAPI, tokenizer_manager: Any) -> None:
    """Resolve ``model`` on every route that the tables above name."""
    for endpoint, refusal in (ANY_MODEL | BASE_MODEL_ONLY).items():
        replace(app, endpoint, _resolving(endpoint, refusal, tokenizer_manager))


def _resolving(endpoint: Callable[..., Any], refusal: Refusal, tokenizer_manager: Any) -> Callable[..., Any]:
    """``endpoint``, asked where ``model`` names somebody who answers there."""

    @functools.wraps(endpoint)  # and so FastAPI parses what upstream's parameters ask for
    async def resolved(*, raw_request: Request, request: Any = None, **form: Any) -> Any:
        try:
            adapter = await adapter_of_model(tokenizer_manager, form["model"] if request is None else request.model)
        except UnknownModel as error:
            return refusal(str(error), error.status_code)
        if adapter is not None and endpoint in BASE_MODEL_ONLY:
            return refusal(f"This route is answered by the base model only, not by the adapter '{adapter}'.", 400)
        # `lora_path` of some bodies has a name for each prompt; `model` comes first.
        raw_request.state.blocklora_adapter = adapter or getattr(request, "lora_path", None)
        body = {} if request is None else {"request": request}
        return await endpoint(raw_request=raw_request, **body, **form)

    return resolved


def _validate_model(original: Any, self: Any, model: Any) -> None:
    """Unknown names have been refused; upstream knows none that is yet to be loaded."""


HOOKS = (
    Hook(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses._validate_model",
        _validate_model,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream refuses adapters that a request may load, and names of a model that has a colon.",
        retire_when="upstream asks one resolver for every route",
    ),
)
