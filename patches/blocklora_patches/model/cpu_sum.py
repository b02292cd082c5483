"""Sums over TP ranks through shared memory on SGLang's CPU engine (``sglang_blocklora/cpu_sum.py``)."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora import cpu_only, cpu_sum
from sglang_blocklora.cpu_sum import SharedSum

from blocklora_patches.hooks.hook import Hook, Process

_sums: dict[tuple[int, ...], SharedSum] = {}  # of ranks that share memory


def share_memory(group: GroupCoordinator) -> None:
    """Let ``group``, and other groups of the same ranks, add up in shared memory where its ranks have one machine.

    Collective over ``group``. Nothing on a machine with an accelerator.
    """
    if len(group.ranks) > 1 and cpu_only.is_cpu_only() and cpu_sum.is_usable():
        shared = SharedSum.of(group.cpu_group)
        if shared is not None:
            _sums[tuple(group.ranks)] = shared


def _all_reduce(original: Any, self: GroupCoordinator, tensor: torch.Tensor) -> torch.Tensor:
    shared = _sums.get(tuple(self.ranks)) if _sums else None
    if shared is not None and shared.takes(tensor):
        shared.all_reduce_(tensor)
        return tensor
    reduced: torch.Tensor = original(self, tensor)
    return reduced


HOOKS = (
    Hook(
        "sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce",
        _all_reduce,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="On a CPU without AMX it goes over gloo, which takes longer than the rest of a small model's step.",
        retire_when="upstream sums in shared memory on every x86-64 CPU",
    ),
)
