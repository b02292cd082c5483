"""A session's turns, over SGLang's own sessions."""

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


def streamed(session: Any, **fields: Any) -> Any:
    """A turn of a streaming session that SGLang has just made."""
    turn = SimpleNamespace(rid="2", session=session, lora_id="id", extra_key="2:id", cache_salt=None, refused=None)
    vars(turn).update(fields)
    turn.set_finish_with_abort = lambda message: setattr(turn, "refused", message)
    session._inflight = True
    return turn


@pytest.mark.parametrize(
    ("fields", "goes_on"),
    [
        ({}, True),
        ({"extra_key": "2:of"}, False),  # another adapter, or other contents under its name
        ({"lora_id": None, "extra_key": None}, False),
        ({"extra_key": "2@7:id"}, False),  # an activated one, from another token on
        ({"extra_key": "2:idtenant"}, False),
        ({"cache_salt": "salt"}, False),
    ],
    ids=str,
)
def test_a_streaming_session_keeps_to_the_adapter_of_its_kv(upstream: Any, fields: dict, goes_on: bool) -> None:
    session = upstream.session(100, streaming=True)
    first = streamed(session, rid="1", **fields)
    upstream.ours.refuse_other_kv(first)
    assert first.refused is None, "the first turn has no KV to go on from"
    session.req_nodes["1"] = upstream.node(SimpleNamespace(extra_key="2:id", cache_salt=None))
    turn = streamed(session, **fields)
    upstream.ours.refuse_other_kv(turn)
    if goes_on:
        assert (turn.refused, turn.session, session._inflight) == (None, session, True)
    else:
        assert "the same adapter" in turn.refused
        assert (turn.session, turn.lora_id, session._inflight) == (None, None, False), "the next turn can come"


@pytest.mark.parametrize("streaming", [True, False])
def test_other_requests_are_not_looked_at(upstream: Any, streaming: bool) -> None:
    """Those of no session, and of one whose KV lies in the tree."""
    session = upstream.session(100, streaming=False)
    turns(upstream, session)
    turn = streamed(session)
    turn.session = None if streaming else session
    upstream.ours.refuse_other_kv(turn)
    assert turn.refused is None
