"""``session/session_controller.py``: a turn that replaces a whole session takes its turns away one by one."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from blocklora_patches.hooks.hook import Hook, Process


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
