"""Debug mode finds a table that leads out of the arena before a kernel follows it."""

import numpy as np
import pytest
import torch
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor, SliceDescriptor
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.segments import Segments
from blocklora_kernels.table import AdapterTable, pack_entry

CPU = torch.device("cpu")
ONE = Blocks(1, 16, 0)


def set_up(slots: list[int], a_row: int, h_width: int = 4) -> tuple[LoraLinear, BatchMetadata]:
    """A linear [16 -> 16] of rank 4 whose A takes one row of 64 from ``a_row`` and whose B takes row 1."""
    table = AdapterTable(1, 1, 1, 3, CPU)
    b = SliceDescriptor(4, 0, Address(1, 1, 0), 4, ONE)
    descriptor = LinearDescriptor(4, 4, Address(0, a_row, 0), ONE, (b,))
    entry = pack_entry(np.array(descriptor.pack(), np.int32)[None, None], np.ones((1, 1, 3), np.float32))
    table.write(0, torch.tensor(slots), entry)
    planes = [torch.zeros(10, 64), torch.zeros(10, 64)]
    linear = LoraLinear(
        planes, table.slots, table.first_slots, table.descriptors[0, 0], table.scalings[0, 0], 16, (0, 16)
    )
    batch = BatchMetadata(4, 1, h_width, CPU)
    batch.update(Segments.build(np.zeros(2, np.int64)), 2, 4)
    return linear, batch


def check(made: tuple[LoraLinear, BatchMetadata]) -> None:
    made[0].check_addresses(made[1])


@pytest.mark.parametrize("slots", [[3, 4, 5], [9, 0, 4]])
def test_right_addresses_pass(slots):
    check(set_up(slots, 0))


def test_wrong_addresses_are_named():
    with pytest.raises(ValueError, match=r"descriptors\[0\]: rows 16 to 17, expected within the 16 of slots"):
        check(set_up([3, 4, 5], 16))
    with pytest.raises(ValueError, match=r"descriptors\[0\]: h_width 4, expected at most 3"):
        check(set_up([3, 4, 5], 0, h_width=3))
    linear, batch = set_up([9, 0, 4], 0)
    linear.slots[0, 1] = 10
    with pytest.raises(ValueError, match=r"slots\[0\]: 10 to 10, expected 0 to 9"):
        linear.check_addresses(batch)
    linear, batch = set_up([3, 4, 5], 0)
    linear.first_slots[0] = 9
    with pytest.raises(ValueError, match=r"slots\[0\]: 10 to 10, expected 0 to 9"):
        linear.check_addresses(batch)
