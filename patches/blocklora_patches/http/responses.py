"""Lets the Responses API pass the adapter on (``entrypoints/openai/serving_responses.py``)."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.model_names import adapter_of_model

# The adapter of the request that this asyncio task serves: upstream drops it between the two functions below.
_adapter: ContextVar[str | None] = ContextVar("blocklora_responses_adapter")


async def _create_responses(original: Any, self: Any, request: Any, raw_request: Any = None) -> Any:
    try:
        _adapter.set(await adapter_of_model(self.tokenizer_manager, request.model))
    except UnknownModel as error:
        return self.create_error_response(
            message=str(error), err_type="invalid_request_error", status_code=error.status_code, param="model"
        )
    return await original(self, request, raw_request)


def _validate_model(original: Any, self: Any, model: Any) -> None:
    """``create_responses`` has refused unknown names already; upstream knows none that is yet to be loaded."""


def _generate_with_builtin_tools(
    self: Any, request_id: str, request_prompt: Any, adapted_request: Any, *args: Any, **kwargs: Any
) -> None:
    adapted_request.lora_path = _adapter.get()


_CLASS = "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses"
HOOKS = (
    Hook(
        f"{_CLASS}.create_responses",
        _create_responses,
        HookType.AROUND,
        process=Process.HTTP,
        why="An unknown model is a 404 that lists the known names, and a known adapter is kept for the hook below.",
        retire_when="upstream refuses unknown models with the known names",
    ),
    Hook(
        f"{_CLASS}._validate_model",
        _validate_model,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream refuses adapters that a request may load, and names of a model that has a colon.",
        retire_when="upstream asks one resolver for every route",
    ),
    Hook(
        f"{_CLASS}._generate_with_builtin_tools",
        _generate_with_builtin_tools,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Upstream validates an adapter's name and then answers with the base model.",
        retire_when="upstream sets lora_path",
    ),
)
