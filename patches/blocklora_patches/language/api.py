"""Lets the calls that generate take ``adapter=`` and ``invoke=`` (``lang/api.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.choice import NOT_GIVEN, Choice, chosen

from blocklora_patches.hooks.hook import Hook, Process


def _with_adapter(original: Any, *args: Any, adapter: Choice = NOT_GIVEN, invoke: bool = False, **kwargs: Any) -> Any:
    """The expression, with the adapter it was written with: its own, or that of the block around it.

    invoke  the call first writes what activates its adapter, where that is an activated one
    """
    expression = original(*args, **kwargs)
    expression.adapter = chosen(adapter)
    expression.invoke = invoke
    return expression


HOOKS = tuple(
    Hook(
        f"sglang.lang.api.{name}",
        _with_adapter,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="Upstream's expressions name no adapter.",
        retire_when="they do",
    )
    for name in ("gen", "gen_int", "gen_string", "select")
)
