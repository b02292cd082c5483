"""Finds the adapter that a generation call of the frontend language asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final


class NotGiven:
    """No adapter was named here: what is around decides. ``None`` is the base model, named explicitly."""

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Final = NotGiven()
Choice = str | None | NotGiven
_block: ContextVar[Choice] = ContextVar("blocklora_adapter_block", default=NOT_GIVEN)


class AdapterUnavailable(LookupError):
    """A program asked for an adapter that its backend does not answer with."""


class UnknownAdapter(AdapterUnavailable):
    """The backend serves adapters, but none of that name; the message lists those it has."""

    def __init__(self, adapter: str, where: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"adapter {adapter!r} is not loaded at {where}. Loaded: {names}.")


class AdaptersNotSupported(AdapterUnavailable):
    """The backend cannot choose an adapter, and would have answered with its one model."""


class InvocationUnknown(AdapterUnavailable):
    """A call should write what activates its adapter, and its backend does not tell that as text."""


class SeveralAnswersInStream(ValueError):
    """A streaming program asked for n > 1: their pieces would come mixed, as one text."""


@contextmanager
def adapter(name: str | None) -> Iterator[None]:
    """Calls written inside the block use adapter ``name`` (None: the base model) unless they name their own."""
    with choice_of_block(name):
        yield


@contextmanager
def choice_of_block(choice: Choice) -> Iterator[None]:
    """Like ``adapter``; ``NOT_GIVEN`` hides the blocks around."""
    token = _block.set(choice)
    try:
        yield
    finally:
        _block.reset(token)


def chosen(choice: Choice) -> Choice:
    """``choice``, or that of the innermost block where it was not given."""
    return _block.get() if isinstance(choice, NotGiven) else choice
