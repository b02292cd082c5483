"""The one exception for everything that can be wrong with an adapter."""

from __future__ import annotations


class AdapterError(ValueError):
    """An adapter was refused. Nothing was taken: no name, no slot, no host memory.

    The message names the adapter, the module (where there is one), what was found, what was expected and what to do.
    """

    def __init__(self, adapter: str, found: str, expected: str, advice: str, module: str | None = None) -> None:
        where = f"adapter {adapter!r}" + (f", module {module!r}" if module else "")
        super().__init__(f"{where}: found {found}; expected {expected}. {advice}")
