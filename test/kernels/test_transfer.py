"""Loading to the arena beside a forward pass on a GPU: ordered by the device alone. Skipped without a GPU."""

from __future__ import annotations

import pytest
import torch
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
