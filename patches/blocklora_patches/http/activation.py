"""Says in an answer where an activated adapter began, or that it did not (``managers/tokenizer_manager.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.requests.activation import FIELD

from blocklora_patches.hooks.hook import Hook, Process


def tell(meta_info: dict[str, Any], state: Any, customized_info: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Put the field into ``meta_info`` of request ``index``; the rest of ``customized_info``.

    It comes once, with the first token, and is told with every piece of the answer. ``state`` is the request's.
    """
    values = customized_info.get(FIELD)
    first = values[index][0] if values is not None and values[index] else None
    if first is not None:
        state.blocklora_activated_from = None if first < 0 else first
    if hasattr(state, "blocklora_activated_from"):
        meta_info[FIELD] = state.blocklora_activated_from
    return {key: values for key, values in customized_info.items() if key != FIELD}


def _build_endpoint_weight_version_metadata(result: dict[str, Any], meta_info: Mapping[str, Any]) -> None:
    if FIELD in meta_info:
        result[FIELD] = meta_info[FIELD]


_OPENAI = "sglang.srt.entrypoints.openai"
HOOKS = tuple(
    Hook(
        f"{_OPENAI}.{module}.build_endpoint_weight_version_metadata",
        _build_endpoint_weight_version_metadata,
        HookType.AFTER,
        process=Process.HTTP,
        why="OpenAI's answers carry nothing else of a request's own.",
        retire_when="upstream puts what schedulers tell of a request into them",
    )
    for module in ("serving_chat", "serving_completions")
)
