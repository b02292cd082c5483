"""Device memory outside the KV pool, for which SGLang leaves no room, at the sizes of real models."""

from __future__ import annotations

import pytest
from blocklora_testing.gpu.budget import SERVERS, TOO_SMALL, kv_slots, outside_the_pool, slot_bytes

SHARE = 0.01


@pytest.mark.parametrize(
    ("model", "tp", "weight_bytes", "gpu"),
    [pytest.param(*one, id=f"{one[0].name} TP {one[1]} {one[3].name}") for one in SERVERS],
)
def test_at_most_one_percent_of_the_pool_is_taken_outside_it(model, tp, weight_bytes, gpu) -> None:
    slots = kv_slots(model, tp, gpu, weight_bytes)
    taken = outside_the_pool(model, tp, gpu, slots)
    told = "\n".join(f"{size / 2**20:9.2f} MiB  {where}" for where, size in taken.most_common())
    for file in ("table.py", "batch.py", "transfer.py", "accounting.py", "scatter.py"):
        assert any(where.startswith(file) for where in taken), f"nothing of {file} was counted:\n{told}"
    assert sum(taken.values()) <= SHARE * slots * slot_bytes(model, tp), told


@pytest.mark.parametrize(("model", "tp", "weight_bytes", "gpu"), TOO_SMALL)
def test_sizes_that_are_left_out_do_not_fit(model, tp, weight_bytes, gpu) -> None:
    assert kv_slots(model, tp, gpu, weight_bytes) * slot_bytes(model, tp) < 2**30
