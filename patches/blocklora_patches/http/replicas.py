"""Sends requests to the data parallel replica where their adapter is.

The HTTP process knows every request in flight, and the data parallel controller obeys ``routed_dp_rank``, so the choice
is made here and the controller stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.runtime_context import get_disagg, get_parallel
from sglang_blocklora.scheduling.replicas import choose_replica
from sglang_blocklora.settings import Settings


def choose(manager: Any, requests: Sequence[Any]) -> None:
    """Give each of ``requests``, which are about to be sent, its replica, where there are several."""
    settings = Settings.active()
    if get_parallel().dp_size == 1 or settings is None or not settings.route_by_adapter:
        return
    if get_disagg().disaggregation_mode != "null":  # there the prefill server's replica decides
        return
    loads = dict.fromkeys(range(get_parallel().dp_size), 0)
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
