"""SGLang's models without a server: as any TP rank would build them, with no process group."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang_blocklora import cpu_only

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    cpu_only.prepare_import()
    from sglang.srt.runtime_context import get_context, get_parallel


@contextmanager
def tp_rank(rank: int, size: int) -> Iterator[None]:
    """SGLang as it believes to be TP rank ``rank`` of ``size``; no process group is made."""
    alone = SimpleNamespace(world_size=1, rank_in_group=0, is_first_rank=True, is_last_rank=True)
    group = SimpleNamespace(world_size=size, rank_in_group=rank, cpu_group=None, device_group=None)
    with (
        get_context().override_server_args(device="cpu", tp_size=size, disable_shared_experts_fusion=True),
        get_parallel().override(
            tp_size=size,
            tp_rank=rank,
            tp_group=group,
            attn_tp_size=size,
            attn_tp_rank=rank,
            attn_tp_group=group,
            moe_tp_size=size,
            moe_tp_group=group,
            moe_ep_size=1,
            moe_ep_rank=0,
            moe_tp_rank=rank,
            moe_dp_size=1,
            pp_size=1,
            pp_rank=0,
            pp_group=alone,
        ),
    ):
        yield


def build(architecture: type[torch.nn.Module], config: Any, device: str) -> torch.nn.Module:
    """SGLang's model of a Hugging Face config, within ``tp_rank``; its weights are not initialised."""
    rope = torch.nn.Identity()  # SGLang's own wants kernels that this machine may not have; no linear depends on it
    rope.rotary_dim = 24
    modules = {sys.modules[one.__module__] for one in architecture.__mro__}
    with ExitStack() as stack:
        for module in modules:
            for name in ("get_rope", "get_rope_wrapper"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, return_value=rope))
        stack.enter_context(torch.device(device))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # upstream's, about quantisation methods that this machine cannot use
        return architecture(config)
