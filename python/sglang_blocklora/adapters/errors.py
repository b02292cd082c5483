"""The one exception for everything that can be wrong with an adapter, and how its message tells it."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN_CHARACTERS = 120
SHOWN_ITEMS = 4


class AdapterError(ValueError):
    """An adapter was refused. Nothing was taken: no name, no slot, no host memory.

    The message names the adapter, the module (where there is one), what was found, what was expected and what to do.
    """

    def __init__(self, adapter: str, found: str, expected: str, advice: str, module: str | None = None) -> None:
        where = f"adapter {adapter!r}" + (f", module {brief(module)}" if module else "")
        super().__init__(f"{where}: found {found}; expected {expected}. {advice}")


def brief(value: object) -> str:
    """``repr`` of something out of an adapter's files, cut short: they may hold megabytes of it."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def listed(names: Sequence[str]) -> str:
    """The first few of ``names`` and how many more there are."""
    more = f" and {len(names) - SHOWN_ITEMS} more" if len(names) > SHOWN_ITEMS else ""
    return ", ".join(names[:SHOWN_ITEMS]) + more
