"""Stands in for Triton's driver: kernels are compiled for an H100 and, in place of being launched, told to a list."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

H100 = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


@dataclass(frozen=True)
class Launch:
    """One launch as the driver would get it: the kernel's name, its programs, and its arguments by name."""

    kernel: str
    programs: int
    arguments: dict[str, Any]


def record_launches() -> list[Launch]:
    """Put the stand-in in place for this process; the list that every later launch is added to."""
    launches: list[Launch] = []

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self._name, self._names = source.fn.__name__, source.fn.arg_names

        def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
            """``rest``: stream, function, two of metadata, two hooks; then the kernel's arguments."""
            launches.append(Launch(self._name, x * y * z, dict(zip(self._names, rest[6:], strict=True))))

    driver.set_active(
        SimpleNamespace(
            launcher_cls=Launcher,
            utils=SimpleNamespace(
                get_device_properties=lambda device: H100,
                load_binary=lambda name, kernel, shared, device: (1, 2, 128, 0, 1024),
            ),
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            get_device_interface=lambda: torch.cuda,
            is_active=lambda: True,
            map_python_to_cpp_type=lambda name: name,
        )
    )
    return launches
