"""Launches a Triton kernel again without what the first launch had to find out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class Launcher:
    """A kernel and its compiled variants, each found by what a caller knows to decide which one it is.

    Triton derives the variant from all arguments at each launch, which takes about 20 us of host time; a launch whose
    variant is known takes about 5. In the interpreter nothing is compiled and every launch is a first one.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def launch(
        self, variant: Hashable, grid: int, arguments: tuple[Any, ...], constants: Mapping[str, int], **options: int
    ) -> None:
        """Launch ``grid`` programs.

        variant    equal for launches that differ in nothing that the compiler sees: types of arguments, which of them
                   are multiples of 16, constants and options
        arguments  the kernel's first parameters; the rest are ``constants``, in order
        options    ``num_warps``, ``num_stages``, ``launch_pdl``
        """
        compiled = self._compiled.get(variant)
        if compiled is None:
            self._compiled[variant] = self._kernel[(grid,)](*arguments, **constants, **options)
        else:
            compiled[(grid, 1, 1)](*arguments, *constants.values())
