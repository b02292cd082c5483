"""``session/session_controller.py``: a turn that replaces a whole session takes its turns away one by one.

And a streaming session, whose KV is its own and under no key, keeps to one adapter.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


def refuse_other_kv(req: Any) -> None:
    """Refuse a turn of a streaming session that would go on from KV which another adapter, or tenant, computed."""
    session = req.session
    if session is None or not session.streaming or not session.req_nodes:
        return
    (node,) = session.req_nodes.values()
    before = node.req
    if (before.extra_key, before.cache_salt) == (req.extra_key, req.cache_salt):
        return
    req.lora_id = req.extra_key = None  # what is left of it is one token, and no adapter may delay it
    req.set_finish_with_abort(
        "The turns of a streaming session go on from one KV: they must name the same adapter, of the same contents and "
        "active from the same token on, extra_key and cache_salt. Open another session."
    )
    session.abort_req()  # as SGLang leaves a session whose turn was refused
    req.session = None


def _create_req(self: Any, req: Any, *args: Any, **kwargs: Any) -> None:
    """Upstream walks over the turns while it removes them, which Python ends with an error, and that the scheduler."""
    asked = req.session_params
    if asked.replace and asked.rid is None and not self.streaming:
        while self.req_nodes:
            first = next(iter(self.req_nodes.values()))  # a turn comes before those that follow it
            first.clear(self.req_nodes)


HOOKS = (
    Hook(
        "sglang.srt.session.session_controller.Session.create_req",
        _create_req,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="A turn with replace and without rid ended the scheduler.",
        retire_when="upstream copies the turns before it removes them",
    ),
)
