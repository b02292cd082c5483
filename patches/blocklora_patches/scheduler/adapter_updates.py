"""Loads and unloads adapters beside the steps; answers carry their request's id (``managers/scheduler.py``).

Upstream's scheduler reads an adapter's files while every running request waits. Here it starts the read and goes on.
TP rank 0 sees when all ranks have read, and tells it with the next requests, as upstream does with timeouts.
"""

from __future__ import annotations

from typing import Any

import zmq
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.memory.reads import Decision

from blocklora_patches.hooks.hook import Hook, Process


def _load_lora_adapter(original: Any, self: Any, recv_req: Any) -> None:
    """No answer yet: ``_process_input_requests`` gives it."""
    manager = self.tp_worker.model_runner.lora_manager
    if self.idle_sleeper is not None:
        self.idle_sleeper.poller.register(manager.reads.wake_fd, zmq.POLLIN)
    manager.begin_load(recv_req.to_ref(), recv_req)


def _unload_lora_adapter(result: Any, self: Any, recv_req: Any) -> None:
    result.rid = recv_req.rid


def _poll_timeout_aborts(result: list[Any], self: Any) -> list[Any]:
    """On TP rank 0 only, once a step: what it decided travels to all ranks with the requests."""
    manager = self.tp_worker.model_runner.lora_manager
    return result if manager is None else [*result, *manager.reads.decisions()]


def _process_input_requests(self: Any, recv_reqs: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    decisions = [one for one in recv_reqs if isinstance(one, Decision)]
    if not decisions:
        return None
    for decision in decisions:
        loaded = self.tp_worker.model_runner.lora_manager.end_load(decision)
        if loaded is not None:
            request, output = loaded
            output.rid = request.rid
            self.ipc_channels.send_to_tokenizer.send_output(output, request)
    return (self, [one for one in recv_reqs if not isinstance(one, Decision)]), {}


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HOOKS = (
    Hook(
        f"{_SCHEDULER}.load_lora_adapter",
        _load_lora_adapter,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Upstream reads files in the scheduler's step: all requests wait for the storage.",
        retire_when="upstream reads adapters beside its steps",
    ),
    Hook(
        f"{_SCHEDULER}.unload_lora_adapter",
        _unload_lora_adapter,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="Upstream's answers carry no id, so one that comes late is taken for the next one's.",
        retire_when="upstream's answers carry the id of their request",
    ),
    Hook(
        f"{_SCHEDULER}._poll_timeout_aborts",
        _poll_timeout_aborts,
        HookType.AFTER,
        process=Process.SCHEDULER,
        why="What TP rank 0 sees by its clock must reach all ranks in one step: here its own words join the requests.",
        retire_when="plugins can add messages to the requests' broadcast",
    ),
    Hook(
        f"{_SCHEDULER}.process_input_requests",
        _process_input_requests,
        HookType.BEFORE,
        process=Process.SCHEDULER,
        why="The words that TP rank 0 added are taken out again, on every rank.",
        retire_when="plugins can add messages to the requests' broadcast",
    ),
)
