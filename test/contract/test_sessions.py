"""A session's turns, over SGLang's own session."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def upstream() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang warns while it is imported
        from blocklora_patches.scheduler import sessions
        from sglang.srt.managers.io_struct import SessionParams
        from sglang.srt.session.session_controller import Session, SessionReqNode
    return SimpleNamespace(ours=sessions, params=SessionParams, session=Session, node=SessionReqNode)


def turns(upstream: Any, session: Any) -> dict[str, Any]:
    """Two turns that follow a first, one of them followed again, and a first turn of another conversation."""
    nodes: dict[str, Any] = {}
    for name, parent in {"a": None, "b": "a", "c": "b", "d": "a", "e": None}.items():
        request = SimpleNamespace(rid=name, finished_reason=None if name == "d" else "stop", to_finish=None)
        nodes[name] = session.req_nodes[name] = upstream.node(request, nodes.get(parent))
    return nodes


def test_a_turn_that_replaces_all_removes_all(upstream: Any) -> None:
    session = upstream.session(100)
    nodes = turns(upstream, session)
    upstream.ours._create_req(session, SimpleNamespace(session_params=upstream.params(id="s", replace=True)))
    assert session.req_nodes == {}
    assert [name for name, node in nodes.items() if node.req.to_finish is not None] == ["d"], "one was running"


@pytest.mark.parametrize("fields", [{}, {"replace": True, "rid": "b"}, {"rid": "c"}], ids=str)
def test_other_turns_are_upstreams(upstream: Any, fields: dict) -> None:
    session = upstream.session(100)
    nodes = turns(upstream, session)
    upstream.ours._create_req(session, SimpleNamespace(session_params=upstream.params(id="s", **fields)))
    assert session.req_nodes == nodes
