"""Sums over TP ranks through shared memory on SGLang's CPU engine (``sglang_blocklora/cpu_sum.py``)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.cpu_sum import SharedSum

from blocklora_patches.hooks.hook import Hook, Process

_sums: WeakKeyDictionary[GroupCoordinator, SharedSum | None] = WeakKeyDictionary()


def _all_reduce(original: Any, self: GroupCoordinator, tensor: torch.Tensor) -> torch.Tensor:
    if self.world_size > 1 and tensor.is_cpu:
        if self not in _sums:
            _sums[self] = SharedSum.of(self.cpu_group)
        shared = _sums[self]
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
