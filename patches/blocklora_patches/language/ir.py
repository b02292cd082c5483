"""Lets a program's ``run`` and ``run_batch`` take ``adapter=``, the default of its calls (``lang/ir.py``)."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextvars import Context, copy_context
from typing import Any

from sglang.lang.global_config import global_config
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.choice import NOT_GIVEN, NotGiven, choice_of_block, chosen

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.language.backends import bind


def _run(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    # A program may have a parameter of its own that is called adapter: then the word is its own.
    given = NOT_GIVEN if "adapter" in self.arg_names else kwargs.pop("adapter", NOT_GIVEN)
    choice = chosen(given)
    if not isinstance(choice, NotGiven):
        kwargs["backend"] = bind(kwargs.get("backend") or global_config.default_backend, choice)
    # The choice is in the backend now: blocks around this call say nothing to the calls inside the program.
    with choice_of_block(NOT_GIVEN):
        result = original(self, *args, **kwargs)
        return _iterate(result, copy_context()) if isinstance(result, Generator) else result


def _iterate(states: Iterator[Any], here: Context) -> Iterator[Any]:
    """Programs of a lazy ``run_batch`` run as it is iterated, maybe inside another block: still as they were called."""
    while True:
        try:
            yield here.run(next, states)
        except StopIteration:
            return


HOOKS = tuple(
    Hook(
        f"sglang.lang.ir.SglFunction.{name}",
        _run,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="Upstream's programs have no default adapter.",
        retire_when="they do",
    )
    for name in ("run", "run_batch")
)
