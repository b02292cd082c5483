"""Sends requests to the data parallel replica where their adapter is (``managers/tokenizer_manager.py``).

The HTTP process knows every request in flight, and the data parallel controller obeys ``routed_dp_rank``, so the choice
is made here and the controller stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_disagg, get_parallel
from sglang_blocklora.scheduling.replicas import choose_replica
from sglang_blocklora.settings import Settings

from blocklora_patches.hooks.hook import Hook, Process


def _is_replicated() -> bool:
    return get_parallel().dp_size > 1


def _send_one_request(self: Any, tokenized_obj: Any) -> None:
    _route(self, [tokenized_obj])


def _send_batch_request(self: Any, tokenized_objs: Sequence[Any]) -> None:
    _route(self, tokenized_objs)


def _route(manager: Any, requests: Sequence[Any]) -> None:
    settings = Settings.active()
    if not _is_replicated() or settings is None or not settings.route_by_adapter:
        return
    if get_disagg().disaggregation_mode != "null":  # there the prefill server's replica decides
        return
    loads = [0] * get_parallel().dp_size
    for state in manager.rid_to_state.values():
        replica = getattr(state, "blocklora_replica", None)
        if replica is not None:
            loads[replica] += 1
    for request in requests:
        state = manager.rid_to_state[request.rid]
        if request.routed_dp_rank is None:  # a client may have chosen
            request.routed_dp_rank = choose_replica(state.obj.lora_path or None, loads)
        state.blocklora_replica = request.routed_dp_rank
        loads[request.routed_dp_rank] += 1


_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
HOOKS = (
    Hook(
        f"{_MANAGER}._send_one_request",
        _send_one_request,
        HookType.BEFORE,
        process=Process.HTTP,
        why="Upstream's methods ignore adapters.",
        retire_when="upstream routes by adapter",
    ),
    Hook(
        f"{_MANAGER}._send_batch_request",
        _send_batch_request,
        HookType.BEFORE,
        process=Process.HTTP,
        why="As for _send_one_request.",
        retire_when="upstream routes by adapter",
    ),
)
