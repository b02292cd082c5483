"""Stock SGLang on a CPU, for baselines: the CPU preparation, none of our hooks, and pinned memory left out.

Stock LoRA asks for pinned memory, which a machine without a GPU refuses. The argument is dropped in SGLang's own LoRA
modules only: they see a stand-in for the name ``torch`` whose factories ignore it. Each spawned process runs this
file again as its main module, so it holds there too. With STOCK_ADAPTER_LOADS set, the first TP rank appends the
folder's name of each adapter it copies into a slot to that file, because stock SGLang does not count them. STOCK_CHANGE
names a function (``package.module:name``) that each process calls before it starts.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from sglang_blocklora import cpu_only, settings
from sglang_blocklora.launch_server import rank_count, with_defaults

LORA_MODULES = ("layers", "mem_pool", "lora", "lora_manager", "backend.torch_backend", "backend.base_backend")
LOADS_VARIABLE = "STOCK_ADAPTER_LOADS"
CHANGE_VARIABLE = "STOCK_CHANGE"
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like")


class TorchWithoutPinning(types.ModuleType):
    """``torch`` with factories that take and ignore ``pin_memory``."""

    def __getattr__(self, name: str) -> object:
        value = getattr(torch, name)
        if name not in FACTORIES:
            return value

        @functools.wraps(value)
        def factory(*args: object, **kwargs: object) -> torch.Tensor:
            return value(*args, **{**kwargs, "pin_memory": False})

        return factory


def drop_pinning() -> None:
    """Give SGLang's LoRA modules the stand-in, and make ``Tensor.pin_memory`` return the tensor itself."""
    for name in LORA_MODULES:
        module = importlib.import_module(f"sglang.srt.lora.{name}")
        module.torch = TorchWithoutPinning("torch")
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign]


def log_loads(path: str) -> None:
    """Append a line to ``path`` for each copy of an adapter into a slot."""
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    load = LoRAMemoryPool.load_lora_weight_to_buffer

    @functools.wraps(load)
    def logged(pool: Any, uid: str | None, buffer_id: int, adapter: Any, *args: Any, **kwargs: Any) -> None:
        load(pool, uid, buffer_id, adapter, *args, **kwargs)
        if uid is not None and pool.tp_rank == 0:
            with open(path, "a") as out:
                out.write(f"{Path(adapter.config.path).name}\n")

    LoRAMemoryPool.load_lora_weight_to_buffer = logged


if __name__ in ("__main__", "__mp_main__"):
    os.environ[settings.SWITCH_VARIABLE] = "0"
    flags = cpu_only.prepare(rank_count(sys.argv[1:]))
    if flags:
        drop_pinning()
        if LOADS_VARIABLE in os.environ:
            log_loads(os.environ[LOADS_VARIABLE])
    if CHANGE_VARIABLE in os.environ:
        pkgutil.resolve_name(os.environ[CHANGE_VARIABLE])()
if __name__ == "__main__":
    from blocklora_patches.launch import run_sglang

    run_sglang(with_defaults(sys.argv[1:], flags))
