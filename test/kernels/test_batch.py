"""Metadata of a step, the adapter table and the argument checks: no kernel is launched."""

import numpy as np
import pytest
import torch
from blocklora_kernels import tile_table, tiles
from blocklora_kernels.batch import HEADER_FIELDS, BatchMetadata, Captured
from blocklora_kernels.checks import check_activations, check_linear
from blocklora_kernels.descriptor import DESCRIPTOR_FIELDS, MAX_SLICES
from blocklora_kernels.segments import Segments
from blocklora_kernels.side_stream import SideStream
from blocklora_kernels.table import AdapterTable, pack_entry
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(-1, 7), st.integers(1, 90)), max_size=12))
def test_tiles_cover_each_token_once(requests):
    adapters = np.array([a for a, _ in requests], np.int64)
    counts = np.array([c for _, c in requests], np.int64)
    per_token = np.repeat(adapters, counts)
    batch = BatchMetadata(12 * 90, 8, 4, CPU)
    batch.update(Segments.build(adapters, counts), len(per_token), 3)
    packed, capacity = batch.tiles.numpy(), batch.capacity
    count, packed = int(packed[0]), packed[HEADER_FIELDS - 1 :]
    assert count == batch.grid_tiles <= batch.most_tiles(len(per_token)) <= capacity
    seen = np.full(len(per_token), -1)
    for i in range(count):
        adapter, start, stop = packed[1 + i], packed[1 + capacity + i], packed[1 + 2 * capacity + i]
        assert 0 < stop - start <= batch.tiling.block_tokens
        rows = batch.tokens.numpy()[start:stop]
        assert (seen[rows] == -1).all()
        seen[rows] = adapter
    np.testing.assert_array_equal(seen, np.where(per_token < 0, -1, per_token))


def test_tile_table_serves_every_batch():
    for arch in tile_table.TILINGS:
        for tokens in (0, 1, 16, 17, 256, 257, 4096, 10**6):
            step = tiles.tiling(arch, tokens)
            assert tiles.rank_class(arch, 10**6) == tiles.rank_classes(arch)[-1]
            for rank in (1, 16, 17, 256):
                for width in (1, 512, 8192, 10**5):
                    tiles.shrink_tile(arch, step.block_tokens, rank, width)
                    tiles.expand_tile(arch, step.block_tokens, rank, width)


def test_update_refuses_what_does_not_fit():
    batch = BatchMetadata(8, 2, 4, CPU)
    with pytest.raises(ValueError, match="batch_tokens: got 9"):
        batch.update(Segments.build(np.zeros(3, np.int64)), 9, 1)
    with pytest.raises(ValueError, match="3 adapters, expected at most max_segments = 2"):
        batch.update(Segments.build(np.arange(3)), 3, 1)
    with pytest.raises(ValueError, match="token row 2, expected less than batch_tokens = 2"):
        batch.update(Segments.build(np.zeros(3, np.int64)), 2, 1)
    with pytest.raises(ValueError, match="max_segments: got 0"):
        BatchMetadata(8, 0, 4, CPU)
    with pytest.raises(ValueError, match=r"expected < 2\*\*31"):
        BatchMetadata(1 << 20, 1, 1 << 12, CPU)


def test_tiles_of_the_graph_that_replays():
    batch = BatchMetadata(300, 2, 4, CPU)
    batch.update(Segments.build(np.zeros(40, np.int64)), 40, 9)
    assert (batch.tiling.block_tokens, batch.grid_tiles, batch.rank_class) == (16, 3, 16)
    batch.update(Segments.build(np.zeros(40, np.int64)), 40, 9, Captured(300, 64))
    assert (batch.tiling.block_tokens, batch.grid_tiles, batch.rank_class) == (64, 1, 17)
    assert batch.tiles[:HEADER_FIELDS].tolist() == [1, 9], "the rank of the batch, not of the graph"


def test_adapter_table():
    table = AdapterTable(2, 3, 6, 5, CPU)
    descriptors = np.arange(2 * 3 * DESCRIPTOR_FIELDS, dtype=np.int32).reshape(2, 3, -1)
    scalings = np.arange(2 * 3 * MAX_SLICES, dtype=np.float32).reshape(2, 3, -1) / 8
    entry = pack_entry(descriptors, scalings)
    for adapter, slots in enumerate([[3, 5], [7, 8, 9], [9, 8], [4], [1, 2, 4, 5]]):
        table.write(adapter, torch.tensor(slots), entry)
        assert table.slots[adapter, : len(slots)].tolist() == slots
    table.write(5, torch.empty(0, dtype=torch.int64), entry)
    assert table.first_slots.tolist() == [-1, 7, -1, 4, -1, -1]
    np.testing.assert_array_equal(table.descriptors[:, :, 1].numpy(), descriptors)
    np.testing.assert_array_equal(table.scalings[:, :, 1].numpy(), scalings)
    table.clear(1)
    assert not table.descriptors[:, :, 1].any()
    assert table.descriptors[:, :, 2].any()
    for name, own in (("descriptors", table.descriptors), ("scalings", table.scalings)):
        places = {own[i, j].data_ptr() % 16 for i in range(2) for j in range(3)}
        assert places == {0}, f"kernels would be compiled anew for {name} of some linears"
    five = torch.arange(5)
    with pytest.raises(ValueError, match=r"slots: got shape \(17,\)"):
        table.write(0, torch.arange(17), entry)
    with pytest.raises(ValueError, match=r"slots: got torch\.int32 on cpu"):
        table.write(0, five.int(), entry)
    with pytest.raises(ValueError, match="adapter: got 6"):
        table.write(6, five, entry)
    with pytest.raises(ValueError, match="entry: got"):
        table.write(0, five, entry[:1])
    with pytest.raises(ValueError, match="descriptors, scalings: got"):
        pack_entry(descriptors, scalings[:, :1])


def arguments(**changed):
    found = {
        "planes": [torch.zeros(10, 64), torch.zeros(10, 64)],
        "slots": torch.zeros(3, 5, dtype=torch.int32),
        "first_slots": torch.zeros(3, dtype=torch.int32),
        "descriptors": torch.zeros(3, DESCRIPTOR_FIELDS, dtype=torch.int32),
        "scalings": torch.zeros(3, MAX_SLICES),
        "in_features": 7,
        "out_offsets": (0, 4, 4, 9),
    }
    return found | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"planes": [torch.zeros(10, 64)]}, "planes: got 1 tensors"),
        ({"planes": [torch.zeros(10, 60)] * 2}, r"planes \(K\): got shape \(10, 60\)"),
        ({"planes": [torch.zeros(64, 64).t()] * 2}, r"strides \(1, 64\)"),
        ({"planes": [torch.zeros(10, 64, dtype=torch.int8)] * 2}, "got dtype torch.int8"),
        ({"planes": [torch.zeros(10, 64), torch.zeros(10, 72)]}, "V has 72"),
        ({"slots": torch.zeros(3, 5)}, "slots: got torch.float32"),
        ({"first_slots": torch.zeros(2, dtype=torch.int32)}, r"expected torch.int32 of shape \(3,\)"),
        ({"descriptors": torch.zeros(3, 9, dtype=torch.int32)}, r"descriptors: .* shape \(3, 35\)"),
        ({"scalings": torch.zeros(3, 2)}, "scalings: got"),
        ({"in_features": 0}, "in_features: got 0"),
        ({"out_offsets": (0, 4, 2)}, r"out_offsets: got \(0, 4, 2\)"),
        ({"out_offsets": (1, 4)}, "start at 0"),
    ],
)
def test_linear_refuses_what_does_not_fit(changed, message):
    check_linear(**arguments())
    with pytest.raises(ValueError, match=message):
        check_linear(**arguments(**changed))


def test_activations_are_checked():
    check_activations("x", torch.zeros(4, 7), 7, torch.float32, 3)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 7\), expected \[3 or more, 7\]"):
        check_activations("x", torch.zeros(2, 7), 7, torch.float32, 3)
    with pytest.raises(ValueError, match="expected the arena's"):
        check_activations("x", torch.zeros(3, 7, dtype=torch.float16), 7, torch.float32, 3)
    with pytest.raises(ValueError, match=r"strides \(1, 3\)"):
        check_activations("x", torch.zeros(7, 3).t(), 7, torch.float32, 3)


def test_side_stream_keeps_order_without_streams():
    side, seen = SideStream(CPU), []
    with side.fork():
        seen.append("shrink")
    seen.append("base")
    side.join()
    assert seen == ["shrink", "base"]
