"""Runs each generating expression of a program under its adapter (``lang/interpreter.py``)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from sglang.lang.ir import SglExprList, SglGen
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.naming.choice import (
    NOT_GIVEN,
    AdaptersNotSupported,
    AdapterUnavailable,
    Choice,
    NotGiven,
    SeveralAnswersInStream,
)

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.language.backends import Bound, bind, bound_adapter

REFUSED = (AdapterUnavailable, SeveralAnswersInStream)


def _choice_of(expression: Any) -> Choice:
    return getattr(expression, "adapter", NOT_GIVEN)


def _submit(self: Any, expression: Any) -> None:
    """Refuse what cannot be had where the program asks for it, not later in the worker thread."""
    if isinstance(expression, SglExprList):
        for part in expression.expr_list:
            _submit(self, part)
        return
    try:
        _check_stream(self, expression)
        _check_adapter(self, _choice_of(expression))
    except REFUSED as error:
        self.error_ = error  # a streaming program runs in a thread of its own: its reader raises this
        raise


def _check_stream(executor: Any, expression: Any) -> None:
    if executor.stream and isinstance(expression, SglGen):
        n = executor._resolve_sampling_params(expression.sampling_params).n
        if n > 1:
            raise SeveralAnswersInStream(
                f"gen({expression.name!r}, n={n}) in a streaming program: the pieces of {n} answers would come mixed. "
                "Run the program without stream=True, or fork it."
            )


def _check_adapter(executor: Any, choice: Choice) -> None:
    if isinstance(choice, NotGiven):
        return
    bind(executor.backend, choice)
    if executor.num_api_spec_tokens is not None and choice != bound_adapter(executor.backend):
        raise AdaptersNotSupported(
            f"adapter {choice!r}: with num_api_spec_tokens one request answers several calls, so the whole program "
            "has one adapter. Choose it with run(adapter=...)."
        )


def _execute(original: Any, self: Any, expression: Any) -> Any:
    choice = _choice_of(expression)
    backend = self.backend
    try:
        if not isinstance(choice, NotGiven):
            self.backend = bind(backend, choice)
        if getattr(expression, "invoke", False) and isinstance(self.backend, Bound):
            self._execute_fill(self.backend.invocation(self.text_))
        return original(self, expression)
    except AdapterUnavailable as error:
        self.error_ = error  # kept before the worker thread wakes up who waits for the answer
        raise
    finally:
        self.backend = backend


def _fork(self: Any, *args: Any, **kwargs: Any) -> None:
    self.sync()


def _get_var(original: Any, self: Any, name: str) -> Any:
    try:
        return original(self, name)
    except KeyError:
        _raise_error(self)
        raise


def _raise_error(executor: Any) -> None:
    if isinstance(executor.error_, REFUSED):
        raise executor.error_


def _thread_worker_func(_: Any, self: Any) -> None:
    if self.stream_text_event:
        self.stream_text_event.set()


def _text_iter(original: Any, self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
    yield from original(self, *args, **kwargs)
    _raise_error(self.stream_executor)


async def _text_async_iter(original: Any, self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    async for item in original(self, *args, **kwargs):
        yield item
    _raise_error(self.stream_executor)


_EXECUTOR = "sglang.lang.interpreter.StreamExecutor"
_STATE = "sglang.lang.interpreter.ProgramState"
HOOKS = (
    Hook(
        f"{_EXECUTOR}.submit",
        _submit,
        HookType.BEFORE,
        process=Process.SCRIPT,
        why="An unknown adapter is an error, never the base model.",
        retire_when="upstream's language knows adapters",
    ),
    Hook(
        f"{_EXECUTOR}._execute_gen",
        _execute,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="The adapter of a call reaches the backend.",
        retire_when="upstream passes an adapter to backends",
    ),
    Hook(
        f"{_EXECUTOR}._execute_select",
        _execute,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="As for _execute_gen.",
        retire_when="upstream passes an adapter to backends",
    ),
    Hook(
        f"{_EXECUTOR}.fork",
        _fork,
        HookType.BEFORE,
        process=Process.SCRIPT,
        why="Upstream has the text before a fork computed once for all branches, but only where its worker has "
        "written that text by then.",
        retire_when="upstream waits for it",
    ),
    Hook(
        f"{_EXECUTOR}._thread_worker_func",
        _thread_worker_func,
        HookType.AFTER,
        process=Process.SCRIPT,
        why="Upstream wakes a stream's reader and then says that it has finished: a reader quick enough to "
        "look in between waits for ever.",
        retire_when="upstream says it first",
    ),
    Hook(
        f"{_EXECUTOR}.get_var",
        _get_var,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="Who asks for an answer learns why there is none.",
        retire_when="upstream raises a program's error in get_var",
    ),
    Hook(
        f"{_STATE}.text_iter",
        _text_iter,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="A stream that was refused raises, and does not just end.",
        retire_when="upstream raises a program's error in its streams",
    ),
    Hook(
        f"{_STATE}.text_async_iter",
        _text_async_iter,
        HookType.AROUND,
        process=Process.SCRIPT,
        why="As for text_iter.",
        retire_when="upstream raises a program's error in its streams",
    ),
)
