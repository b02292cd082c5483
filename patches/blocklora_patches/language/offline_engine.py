"""Lets ``Engine.generate`` take ``adapter=``; no stock engine starts beside our hooks (``entrypoints/engine.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.choice import NOT_GIVEN, NotGiven
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process

# A name, None for the base model, or one of these per prompt.
AdapterNames = str | list[str | None] | NotGiven | None


def _generate(original: Any, self: Any, *args: Any, adapter: AdapterNames = NOT_GIVEN, **kwargs: Any) -> Any:
    if not isinstance(adapter, NotGiven):
        if kwargs.get("lora_path") is not None:
            raise ValueError(f"adapter={adapter!r} and lora_path={kwargs['lora_path']!r}: give one of the two")
        kwargs["lora_path"] = adapter
    return original(self, *args, **kwargs)


def _launch_subprocesses(cls: Any, *args: Any, **kwargs: Any) -> None:
    if Settings.from_environment() is None:
        raise RuntimeError(
            "An engine of sglang-blocklora was started in this process, which cannot run a stock one since. Start it "
            "with sglang_blocklora.frontend.engine(...), or in another process."
        )


_ENGINE = "sglang.srt.entrypoints.engine.Engine"
HOOKS = (
    *(
        Hook(
            f"{_ENGINE}.{name}",
            _generate,
            HookType.AROUND,
            process=Process.HTTP,
            why="The word of the frontend language, for lora_path.",
            retire_when="upstream takes it",
        )
        for name in ("generate", "async_generate")
    ),
    Hook(
        f"{_ENGINE}._launch_subprocesses",
        _launch_subprocesses,
        HookType.BEFORE,
        process=Process.HTTP,
        why="A stock engine would have our half of the HTTP process and SGLang's half of the scheduler.",
        retire_when="hooks can be taken back",
    ),
)
