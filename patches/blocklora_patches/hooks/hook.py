"""What a hook is: data, so that the list of everything we change in SGLang can be read and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.plugins.hook_registry import HookType


class Hook(NamedTuple):
    """target    dotted path of the upstream function, method or class
    handler   our function or class
    kind      how SGLang's registry applies it
    why       what it is for, and when it can go
    """

    target: str
    handler: Callable[..., Any] | type
    kind: HookType
    why: str
