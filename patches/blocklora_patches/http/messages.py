"""Answers an unknown model on ``/v1/messages`` with a 404 in Anthropic's form (``anthropic/serving.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.model_names import UnknownModel

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.http.model_names import adapter_of_model


async def _of_a_known_model(original: Any, self: Any, request: Any, raw_request: Any) -> Any:
    try:
        await adapter_of_model(self.openai_serving_chat.tokenizer_manager, request.model)
    except UnknownModel as error:
        return self._error_response(status_code=error.status_code, error_type="not_found_error", message=str(error))
    return await original(self, request, raw_request)


HOOKS = tuple(
    Hook(
        f"sglang.srt.entrypoints.anthropic.serving.AnthropicServing.{method}",
        _of_a_known_model,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream tells a refusal of the chat route that it calls as an internal error, or asks nobody.",
        retire_when="upstream passes such refusals on, and refuses unknown models",
    )
    for method in ("handle_messages", "handle_count_tokens")
)
