"""Ends all parts of a request that its client aborts by the id it gave (``managers/tokenizer_manager.py``).

Upstream runs a batch, and each of n answers, as requests with ids of their own, and then knows the client's no more. An
abort that comes before a request was sent, while it waits for its adapter say, is forgotten there too.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.requests.values import BadRequest

from blocklora_patches.hooks.hook import Hook, Process


class Asked:
    """What a client asked for under one id, and whether it was taken back; all parts of it share this."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.aborted = False

    def check(self) -> None:
        """Raise ``BadRequest`` if it was aborted."""
        if self.aborted:
            raise BadRequest(f"The request '{self.rid}' was aborted.")


def note(obj: Any) -> None:
    """Remember the id that a client gave, which a batch loses as it is normalized."""
    if isinstance(obj.rid, str):
        obj.blocklora_asked = Asked(obj.rid)


def mark(obj: Any) -> None:
    """Mark the parts of a normalized request; what upstream copies from them carries the mark on."""
    whole = getattr(obj, "blocklora_asked", None)
    parts = [obj] if obj.is_single else [obj[i] for i in range(len(obj.rid))]
    for part in parts:
        part.blocklora_asked = whole or Asked(part.rid)


def check(part: Any) -> None:
    """Raise ``BadRequest`` if the request of which this is a part was aborted: it is not sent then."""
    part.blocklora_asked.check()


def _abort_request(original: Any, self: Any, rid: str = "", abort_all: bool = False) -> None:
    states = self.rid_to_state
    if abort_all or not rid:
        original(self, rid, abort_all)
        return
    parts = [rid] if rid in states else [one for one, state in states.items() if _asked(state).rid == rid]
    for part in parts:
        _asked(states[part]).aborted = True
        original(self, part)


def _asked(state: Any) -> Asked:
    asked: Asked = state.obj.blocklora_asked
    return asked


HOOKS = (
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",
        _abort_request,
        HookType.AROUND,
        process=Process.HTTP,
        why="Upstream knows the parts of a request by ids of their own only.",
        retire_when="upstream aborts a batch and n answers by the id that their client gave",
    ),
)
