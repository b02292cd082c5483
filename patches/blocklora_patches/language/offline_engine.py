"""``entrypoints/engine.py``: ``Engine.generate`` and ``async_generate`` take ``adapter=``."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.choice import NOT_GIVEN, NotGiven

from blocklora_patches.hooks.hook import Hook, Process

# A name, None for the base model, or one of these per prompt.
AdapterNames = str | list[str | None] | NotGiven | None


def _generate(original: Any, self: Any, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
    if not isinstance(adapter, NotGiven):
        if kwargs.get("lora_path") is not None:
            raise ValueError(f"adapter={adapter!r} and lora_path={kwargs['lora_path']!r}: give one of the two")
        kwargs["lora_path"] = adapter
    return original(self, *args, **kwargs)


HOOKS = tuple(
    Hook(
        f"sglang.srt.entrypoints.engine.Engine.{name}",
        _generate,
        HookType.AROUND,
        process=Process.HTTP,
        why="The word of the frontend language, for lora_path.",
        retire_when="upstream takes it",
    )
    for name in ("generate", "async_generate")
)
