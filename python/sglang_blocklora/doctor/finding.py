"""Says what is asked of the checks, and what they answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user wants to serve, as far as it was said.

    model          folder of the base model, or None
    tp             TP size
    rank, nblocks  of the adapter whose costs are told
    flags          of the launcher, further ones
    """

    model: str | None = None
    tp: int = 1
    rank: int = 16
    nblocks: int = 1
    flags: tuple[str, ...] = ()

    @property
    def launch_flags(self) -> list[str]:
        """The command line of the launcher that was asked for."""
        model = [] if self.model is None else ["--model-path", self.model]
        return [*model, "--tp-size", str(self.tp), *self.flags]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's table.

    found   what there is, or why nothing was looked at
    advice  what to do about a fault, which alone has one
    """

    what: str
    result: Literal["ok", "fault", "skipped"]
    found: str
    advice: str | None = None


def ok(what: str, found: str) -> Finding:
    """A line about what is as it should be."""
    return Finding(what=what, result="ok", found=found)


def fault(what: str, found: str, advice: str) -> Finding:
    """A line about what would make a server fail or answer wrongly."""
    return Finding(what=what, result="fault", found=found, advice=advice)


def skipped(what: str, why: str) -> Finding:
    """A line about what was not looked at."""
    return Finding(what=what, result="skipped", found=why)
