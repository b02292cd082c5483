"""Checks the driver and the devices that torch sees."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped

DRIVER = Path("/proc/driver/nvidia/version")
BFLOAT16 = (8, 0)  # first compute capability that multiplies bfloat16


def check(asked: Asked) -> Iterator[Finding]:
    """The driver, and each device that torch sees."""
    driver = driver_version()
    if not torch.cuda.is_available():
        yield without_cuda(driver)
        return
    yield ok("CUDA", f"driver {driver or 'unknown'}, torch {torch.__version__} with CUDA {torch.version.cuda}")
    count = torch.cuda.device_count()
    if asked.tp > count:
        yield fault("devices", f"{count}; --tp {asked.tp} needs as many", "Use a smaller --tp, or other devices.")
    yield from map(device, range(count))


def driver_version() -> str | None:
    """Version of NVIDIA's driver on this machine, or None."""
    match = re.search(r"Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", DRIVER.read_text()) if DRIVER.exists() else None
    return match[1] if match else None


def without_cuda(driver: str | None) -> Finding:
    """Why torch sees no CUDA device."""
    if driver is None:
        if torch.accelerator.is_available():
            found = str(torch.accelerator.current_accelerator())
            return fault("CUDA", f"none, but a device of kind {found}", "Nothing was tried there: use NVIDIA GPUs.")
        return skipped("CUDA", "no driver and no device: SGLang's CPU engine is used")
    if torch.version.cuda is None:
        advice = "Install torch's build for CUDA (pip install --force-reinstall torch): SGLang would serve on the CPU."
        return fault("CUDA", f"driver {driver}, but torch {torch.__version__} is a build without CUDA", advice)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    return fault(
        "CUDA",
        f"driver {driver}, but torch {torch.__version__} sees no device{chosen}",
        f"Make devices visible, or install a driver for CUDA {torch.version.cuda}.",
    )


def device(index: int) -> Finding:
    """What one device is, and whether it multiplies."""
    seen = torch.cuda.get_device_properties(index)
    what = f"device {index}"
    found = f"{seen.name}, compute capability {seen.major}.{seen.minor}, {seen.total_memory / 2**30:.1f} GiB"
    if (seen.major, seen.minor) < BFLOAT16:
        return fault(what, found, "Use one of compute capability 8.0 or higher, which multiplies bfloat16.")
    try:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
        right = bool(((ones @ ones) == 64).all())
    except RuntimeError as error:
        advice = f"Install a torch that has code for it; this one has {' '.join(torch.cuda.get_arch_list())}."
        return fault(what, f"{found}: {str(error).partition(chr(10))[0]}", advice)
    return ok(what, found) if right else fault(what, f"{found}: multiplies wrongly", "Look after the hardware.")
