"""Defines a hook: data, so that the list of everything we change in SGLang can be read and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from sglang.srt.plugins.hook_registry import HookType


class Process(Enum):
    """Where a hooked function runs (hooks are put in place in every process)."""

    HTTP = "the process that answers HTTP requests and tokenizes, or that holds an Engine"
    SCHEDULER = "the scheduler of each TP rank"
    SCRIPT = "a user's own, in which programs of the frontend language run"


@dataclass(frozen=True)
class Hook:
    """One change to SGLang: which function, what we do there, and until when.

    target       dotted path of the upstream function, method or class
    handler      our function or class
    kind         how SGLang's registry applies it
    process      where the function runs
    why          what it is for
    retire_when  what upstream must do before the hook can go
    """

    target: str
    handler: Callable[..., Any] | type
    kind: HookType
    process: Process = field(kw_only=True)
    why: str = field(kw_only=True)
    retire_when: str = field(kw_only=True)
