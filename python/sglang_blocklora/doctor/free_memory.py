"""Checks free memory, of the host for adapters that are not in use, and of the devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sglang_blocklora import launch_server
from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped
from sglang_blocklora.settings import Settings

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
WEIGHTS = (".safetensors", ".bin", ".gguf")
# Of a device: where less is free another process works there, and SGLang would make do with what is left.
FREE_SHARE = 0.5


def check(asked: Asked) -> Iterator[Finding]:
    """Bytes that are free on the host and on each device, against what the flags ask for."""
    try:
        settings = launch_server.parse(asked.launch_flags)[0]
    except SystemExit:
        yield skipped("host memory", "the flags are refused, see there")
        return
    devices = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
    yield host(settings, launch_server.rank_count(asked.launch_flags), available())
    for index, (free, total) in enumerate(devices):
        yield device(index, free, total)
    if asked.model is not None:
        free = min(free for free, _ in devices) if devices else available() // asked.tp  # TP ranks share the host's
        yield weights(Path(asked.model), asked.tp, free)


def available(cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that new processes can have: of the machine, or of what their container is given."""
    memory = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = int(memory["MemAvailable"].split()[0]) * 1024
    limit = cgroup / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return free
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    used = int((cgroup / "memory.current").read_text()) - int(stat["inactive_file"])  # cached files give way
    return min(free, int(limit.read_text()) - used)


def host(settings: Settings, ranks: int, free: int) -> Finding:
    """Whether all TP ranks' images of adapters fit into ``free`` bytes of host memory."""
    flag = "--adapter-host-memory-gb"
    found = f"{free / GIB:.1f} GiB free, {ranks} x {settings.adapter_host_memory_gb:g} GiB for adapters ({flag})"
    if settings.adapter_host_memory_gb * ranks * GIB <= free:
        return ok("host memory", found)
    return fault("host memory", found, f"Give {flag} {free / GIB / ranks / 2:.1f}, or free memory.")


def device(index: int, free: int, total: int) -> Finding:
    """Whether nobody else has most of a device's memory."""
    what, found = f"memory of device {index}", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free >= FREE_SHARE * total:
        return ok(what, found)
    return fault(what, found, "End what runs there (nvidia-smi lists it), or leave it out with CUDA_VISIBLE_DEVICES.")


def weights(folder: Path, tp: int, free: int) -> Finding:
    """Whether a TP rank's part of the base model's weights fits into ``free`` bytes."""
    what = "base model's weights"
    size = sum(file.stat().st_size for suffix in WEIGHTS for file in folder.glob(f"*{suffix}"))
    if not size:
        return skipped(what, f"no {' or '.join(WEIGHTS)} files in {folder}")
    found = f"{size / tp / GIB:.1f} GiB per TP rank, {free / GIB:.1f} GiB free"
    if size / tp <= free:
        return ok(what, found)
    return fault(what, found, "Use a larger --tp, devices with more memory, or a quantised model.")
