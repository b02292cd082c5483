"""Tells which parts of a request are meant where its client aborts it by the id it gave.

Upstream runs a batch, and each of n answers, as requests with ids of their own, and then knows the client's no more. An
abort that comes before a request was sent, while it waits for its adapter say, is forgotten there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_blocklora.requests.values import BadRequest


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


def end(rid: str, states: Mapping[str, Any]) -> list[str]:
    """Mark the request that its client calls ``rid`` as aborted; ids of the parts of it that there are.

    states  id -> state of all that is asked
    """
    parts = [rid] if rid in states else [part for part, state in states.items() if _asked(state).rid == rid]
    for part in parts:
        _asked(states[part]).aborted = True
    return parts


def _asked(state: Any) -> Asked:
    asked: Asked = state.obj.blocklora_asked
    return asked
