"""Checks on a GPU that images are copied beside a forward pass, and not into it (``memory/transfer.py``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang_blocklora.doctor.finding import Asked, Finding, fault, ok, skipped
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.transfer import Transfer

WHAT = "copies to the arena"
LAYERS, SLOTS, WIDTH, COPIED = 2, 64, 128, 8
BUSY_CYCLES = 200_000_000  # some 0.1 s of a forward pass
OLD, NEW = 1.0, 2.0


def check(asked: Asked) -> Iterator[Finding]:
    """Rows of the arena before, under and after a forward pass; skipped without a GPU."""
    if not torch.cuda.is_available():
        yield skipped(WHAT, "without a GPU rows are written at once")
        return
    device = torch.device("cuda")
    yield judge(*copied_beside_a_pass(device, Transfer(device)))


def copied_beside_a_pass(device: torch.device, transfer: Transfer) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Rows as a pass sees them that runs while others are written over them, as the next sees them; who waited.

    The third is whether the host went on before the running pass had ended.
    """
    arena = StaticArena(LAYERS, SLOTS, WIDTH, torch.float32, device)
    everything = torch.arange(SLOTS, device=device)
    arena.write(everything, torch.full((LAYERS, 2, SLOTS, WIDTH), OLD))
    transfer.bind(arena)
    image = torch.full((LAYERS, 2, COPIED, WIDTH), NEW).pin_memory()
    forward, schedule = torch.cuda.Stream(device), torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(forward):
        transfer.join([])
        torch.cuda._sleep(BUSY_CYCLES)
        before = torch.stack([plane for layer in arena.planes for plane in layer])
    with torch.cuda.stream(schedule):
        transfer.copy("new", everything[:COPIED], image)
    went_on = not forward.query()
    with torch.cuda.stream(forward):
        transfer.join(["new"])
        after = torch.stack([plane for layer in arena.planes for plane in layer])
    torch.cuda.synchronize(device)
    return before.cpu(), after.cpu(), went_on


def judge(before: torch.Tensor, after: torch.Tensor, went_on: bool) -> Finding:
    """The verdict on ``copied_beside_a_pass``; rows are [planes, slots, width]."""
    expected = torch.full_like(after, OLD)
    expected[:, :COPIED] = NEW
    wrong = [
        text
        for text, is_so in (
            ("rows changed under a running forward pass", bool((before != OLD).any())),
            ("the next forward pass did not see the new rows", not torch.equal(after, expected)),
            ("the host waited for the running pass", not went_on),
        )
        if is_so
    ]
    if wrong:
        return fault(WHAT, "; ".join(wrong), "Report it with this machine's driver; serve nothing there meanwhile.")
    return ok(WHAT, "beside a running forward pass, seen by the next")
