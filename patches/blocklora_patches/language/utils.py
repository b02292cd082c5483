"""Lets a program ask for n > 1 answers to one call (``utils.py``)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


def _http_request(original: Any, url: str, json: Any = None, stream: bool = False, **options: Any) -> Any:
    answer = original(url, json, stream, **options)
    if stream or not _asks_for_several(json) or answer.status_code != 200:
        return answer
    answers = answer.json()
    merged = {key: [one[key] for one in answers] for key in ("text", "meta_info")}
    return SimpleNamespace(status_code=200, json=lambda: merged)


def _asks_for_several(body: Any) -> bool:
    """Whether one prompt gets n > 1 answers: a list, which upstream's ``RuntimeEndpoint.generate`` cannot read."""
    return bool(body) and isinstance(body.get("text"), str) and (body.get("sampling_params") or {}).get("n", 1) > 1


HOOKS = (
    Hook(
        "sglang.utils.http_request",
        _http_request,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="Upstream's RuntimeEndpoint fails for n > 1: the server answers with a list.",
        retire_when="upstream reads that list",
    ),
)
