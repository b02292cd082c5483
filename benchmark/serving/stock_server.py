"""Stock SGLang on a CPU, for baselines: the CPU preparation, none of our hooks, and pinned memory left out.

Stock LoRA asks for pinned memory, which a machine without a GPU refuses. The argument is dropped in SGLang's own LoRA
modules only: they see a stand-in for the name ``torch`` whose factories ignore it. Each spawned process runs this
file again as its main module, so it holds there too.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types

import torch
from sglang_blocklora import cpu_only, settings
from sglang_blocklora.launch_server import tp_size, with_defaults

LORA_MODULES = ("layers", "mem_pool", "lora", "lora_manager", "backend.torch_backend", "backend.base_backend")
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


if __name__ in ("__main__", "__mp_main__"):
    os.environ[settings.SWITCH_VARIABLE] = "0"
    flags = cpu_only.prepare(tp_size(sys.argv[1:]))
    if flags:
        drop_pinning()
if __name__ == "__main__":
    from blocklora_patches.launch import run_sglang

    run_sglang(with_defaults(sys.argv[1:], flags))
