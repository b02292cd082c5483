"""``utils.py``: how the language's backends send their requests."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.language.engine import Answer, engine_answer


def _http_request(original: Any, url: str, json: Any = None, stream: bool = False, **options: Any) -> Any:
    answer = engine_answer(url, json) or original(url, json, stream, **options)
    if stream or not _asks_for_several(json) or answer.status_code != 200:
        return answer
    answers = answer.json()
    return Answer(200, {key: [one[key] for one in answers] for key in ("text", "meta_info")})


def _asks_for_several(body: Any) -> bool:
    """Whether one prompt gets n > 1 answers: a list, which upstream's ``RuntimeEndpoint.generate`` cannot read."""
    return bool(body) and isinstance(body.get("text"), str) and (body.get("sampling_params") or {}).get("n", 1) > 1


HOOKS = (
    Hook(
        "sglang.utils.http_request",
        _http_request,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="Upstream's language reaches no engine of its own process, and fails for n > 1.",
        retire_when="upstream does both",
    ),
)
