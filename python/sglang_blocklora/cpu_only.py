"""Lets stock SGLang run on a machine without an accelerator; does nothing where there is one."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import types

import torch

logger = logging.getLogger(__name__)

TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def is_cpu_only() -> bool:
    """Whether torch sees no accelerator of any kind."""
    return not torch.accelerator.is_available()


def prepare_import() -> None:
    """Make ready to import SGLang on a CPU; nothing on a machine with an accelerator."""
    if is_cpu_only():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read while SGLang is imported
        install_shims()


def prepare(ranks: int) -> dict[str, list[str]]:
    """Make ready to import and launch SGLang on a CPU, and return the server flags (flag -> values) that go with it.

    ranks  TP ranks that will run here, those of all replicas: cores are dealt out among them
    Call it before SGLang is imported, in the launching process and (through the main module) in each spawned one.
    On a machine with an accelerator it does nothing and returns no flags.
    """
    if not is_cpu_only():
        return {}
    cores = sorted(os.sched_getaffinity(0))
    per_rank = max(1, len(cores) // ranks)
    shares = [[cores[(rank * per_rank + i) % len(cores)] for i in range(per_rank)] for rank in range(ranks)]
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))
    # One OpenMP thread a core: spinning threads beyond that make a step several times slower.
    os.environ.setdefault("OMP_NUM_THREADS", str(per_rank))
    shimmed = install_shims()
    logger.info(
        "no accelerator: SGLang's CPU engine, TP ranks bound to cores %s, OMP_NUM_THREADS=%s, stand-ins: %s",
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"],
        os.environ["OMP_NUM_THREADS"],
        ", ".join(shimmed) or "none",
    )
    return {"--device": ["cpu"], "--attention-backend": ["torch_native"]}


def install_shims() -> list[str]:
    """Stand-ins for compiled packages that have no CPU build on the index; returns the names of those put in place."""
    shimmed = []
    if _define_torchvision_schemas():
        shimmed.append("torchvision schemas")
    if importlib.util.find_spec("sgl_kernel") is None:
        module = _SglKernelStandIn("sgl_kernel")
        module.__path__ = []  # a package, so that its submodules can be looked up
        module.__spec__ = importlib.util.spec_from_loader("sgl_kernel", loader=None, is_package=True)
        sys.modules["sgl_kernel"] = module
        shimmed.append("sgl_kernel")
    return shimmed


def _define_torchvision_schemas() -> bool:
    """torchvision registers fake kernels for these operators at import and fails where its C++ library did not load."""
    global _library
    if _library is not None or importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in TORCHVISION_SCHEMAS:
        _library.define(schema)
    return True


class _SglKernelStandIn(types.ModuleType):
    """``from sgl_kernel import anything`` works; calling what it gave does not. Ordinary serving calls none of it."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name} needs sgl_kernel, which has no CPU build on the index")

        return missing
