"""Loading to the arena beside a forward pass on a GPU: ordered by the device alone. Skipped without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES
from blocklora_kernels.table import AdapterTable, pack_entry
from sglang_blocklora.memory import transfer as transfer_module
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.transfer import Transfer

LAYERS, SLOTS, WIDTH = 3, 64, 128
BUSY_CYCLES = 200_000_000  # some 0.1 s of a forward pass


def test_on_a_device_without_streams_rows_are_there_at_once() -> None:
    arena = StaticArena(LAYERS, SLOTS, WIDTH, torch.float32, torch.device("cpu"))
    transfer, image = Transfer(torch.device("cpu")), torch.randn(LAYERS, 2, 5, WIDTH)
    transfer.bind(arena)
    transfer.join([])
    transfer.copy("a", torch.tensor([9, 2, 30, 31, 7]), image)
    assert torch.equal(arena._rows[:, :, [9, 2, 30, 31, 7]], image)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_change_after_the_running_pass_and_before_the_next() -> None:
    """A pass that still reads the old rows is queued when the host loads others over them."""
    device = torch.device("cuda")
    arena = StaticArena(LAYERS, SLOTS, WIDTH, torch.float32, device)
    arena._rows.fill_(1.0)
    transfer, forward, schedule = Transfer(device), torch.cuda.Stream(), torch.cuda.Stream()
    transfer.bind(arena)
    forward.wait_stream(torch.cuda.current_stream())
    images = [torch.full((LAYERS, 2, 8, WIDTH), value).pin_memory() for value in (2.0, 3.0)]
    with torch.cuda.stream(forward):
        transfer.join([])
        torch.cuda._sleep(BUSY_CYCLES)
        before = arena._rows.clone()
    with torch.cuda.stream(schedule):
        for start, image in zip((0, 8), images, strict=True):
            transfer.copy(str(start), torch.arange(start, start + 8, device=device), image)
    assert not forward.query(), "the host waited for the running pass"
    with torch.cuda.stream(forward):
        transfer.join(["0", "8"])
        after = arena._rows.clone()
    torch.cuda.synchronize()
    assert (before == 1.0).all(), "rows changed under the running pass"
    assert (after[:, :, :8] == 2.0).all()
    assert (after[:, :, 8:16] == 3.0).all()
    assert (after[:, :, 16:] == 1.0).all()


@contextmanager
def no_wait() -> Iterator[None]:
    """Within it torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_image_larger_than_the_staging_memory_arrives_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Parts end within planes, and each is used many times."""
    monkeypatch.setattr(transfer_module, "PART_BYTES", 4096)
    device = torch.device("cuda")
    arena = StaticArena(LAYERS, SLOTS, WIDTH, dtype, device)
    arena._rows.fill_(1.0)
    transfer = Transfer(device)
    transfer.bind(arena)
    image = torch.randn(LAYERS, 2, 37, WIDTH).to(dtype).pin_memory()
    slots = torch.randperm(SLOTS).to(device)[:40].clone()  # three more than the image has rows
    torch.cuda.synchronize()
    with no_wait():
        transfer.copy("a", slots, image)
        transfer.join(["a"])
    found = arena._rows.clone()
    torch.cuda.synchronize()
    assert torch.equal(found[:, :, slots[:37]].cpu(), image)
    others = sorted(set(range(SLOTS)) - set(slots[:37].tolist()))
    assert (found[:, :, others] == 1.0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_table_entry_is_written_without_a_wait() -> None:
    """The same on the device as on the CPU: slots, whether they are one run, descriptors and scalings."""
    descriptors = np.arange(2 * 3 * DESCRIPTOR_FIELDS, dtype=np.int32).reshape(2, 3, -1)
    scalings = np.arange(2 * 3 * MAX_SLICES, dtype=np.float32).reshape(2, 3, -1) / 8
    tables = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        on_gpu = device.type == "cuda"
        table = AdapterTable(2, 3, 4, 40, device)
        entry = pack_entry(descriptors, scalings, pin_memory=on_gpu)
        given = [torch.tensor(own, device=device) for own in ([3, 5], [*range(7, 37)], [9, 8], [4])]
        if on_gpu:
            torch.cuda.synchronize()
        with no_wait() if on_gpu else nullcontext():
            for adapter, slots in enumerate(given):
                table.write(adapter, slots, entry)
        tables.append(table)
    for name in ("slots", "first_slots", "descriptors", "scalings"):
        on_cpu, on_device = (getattr(table, name).cpu() for table in tables)
        assert torch.equal(on_cpu, on_device), name
    assert tables[0].first_slots.tolist() == [-1, 7, -1, 4]


INTERPRETED = """
import importlib.util, sys
import pytest, torch
from blocklora_kernels import scatter
from blocklora_testing.gpu.device import VirtualGPU

class Interpreted:
    kernel = scatter.scatter_kernel

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            with torch._C.DisableTorchFunction():
                self.kernel[grid](*arguments, **constants)
        return launch

spec = importlib.util.spec_from_file_location("transfers", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
with pytest.MonkeyPatch.context() as patch, VirtualGPU().on():
    patch.setattr(scatter, "scatter_kernel", Interpreted())
    for name in ("set_sync_debug_mode", "synchronize"):
        patch.setattr(torch.cuda, name, lambda *arguments: None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tests.test_an_image_larger_than_the_staging_memory_arrives_whole(patch, dtype)
    tests.test_a_table_entry_is_written_without_a_wait()
"""


def test_what_waits_for_a_gpu_passes_on_one_that_does_not_exist() -> None:
    """Its launches in Triton's interpreter, which is chosen before triton is imported: in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED, __file__], env=environment, check=True)
