"""``lang/interpreter.py``: each generating expression runs on the backend as its adapter sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from sglang.lang.ir import SglExprList
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.adapter_choice import NOT_GIVEN, AdaptersNotSupported, AdapterUnavailable, Choice, NotGiven

from blocklora_patches.hook import Hook
from blocklora_patches.lang_backends import bind, bound_adapter


def _choice_of(expression: Any) -> Choice:
    return getattr(expression, "adapter", NOT_GIVEN)


def _submit(self: Any, expression: Any) -> None:
    """Refuse an adapter that cannot be had where the program asks for it, not later in the worker thread."""
    if isinstance(expression, SglExprList):
        for part in expression.expr_list:
            _submit(self, part)
        return
    choice = _choice_of(expression)
    if isinstance(choice, NotGiven):
        return
    try:
        bind(self.backend, choice)
        if self.num_api_spec_tokens is not None and choice != bound_adapter(self.backend):
            raise AdaptersNotSupported(
                f"adapter {choice!r}: with num_api_spec_tokens one request answers several calls, so the whole program "
                "has one adapter. Choose it with run(adapter=...)."
            )
    except AdapterUnavailable as error:
        self.error_ = error  # a streaming program runs in a thread of its own: its reader raises this
        raise


def _execute(original: Any, self: Any, expression: Any) -> Any:
    choice = _choice_of(expression)
    if isinstance(choice, NotGiven):
        return original(self, expression)
    backend = self.backend
    self.backend = bind(backend, choice)
    try:
        return original(self, expression)
    finally:
        self.backend = backend


def _raise_error(state: Any) -> None:
    error = state.stream_executor.error_
    if isinstance(error, AdapterUnavailable):
        raise error


def _text_iter(original: Any, self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    yield from original(self, *args, **kwargs)
    _raise_error(self)


async def _text_async_iter(original: Any, self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    async for item in original(self, *args, **kwargs):
        yield item
    _raise_error(self)


_EXECUTOR = "sglang.lang.interpreter.StreamExecutor"
_STATE = "sglang.lang.interpreter.ProgramState"
HOOKS = (
    Hook(f"{_EXECUTOR}.submit", _submit, HookType.BEFORE, "An unknown adapter is an error, never the base model."),
    Hook(f"{_EXECUTOR}._execute_gen", _execute, HookType.AROUND, "Goes when upstream passes an adapter to backends."),
    Hook(f"{_EXECUTOR}._execute_select", _execute, HookType.AROUND, "As for _execute_gen."),
    Hook(
        f"{_STATE}.text_iter", _text_iter, HookType.AROUND, "A stream that was refused raises, and does not just end."
    ),
    Hook(f"{_STATE}.text_async_iter", _text_async_iter, HookType.AROUND, "As for text_iter."),
)
