"""The law of sharding: the TP ranks' parts combine to exactly the dense adapter's delta, for every n, N and shape."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from blocklora_kernels import reference
from blocklora_testing.toy import ToyModel, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_blocklora.adapters.shard import AdapterShard, load_shard
from sglang_blocklora.sharding.cut import ModuleShape, cut_slice


def rank_delta(shard: AdapterShard, image: torch.Tensor, spec, layer: int, index: int) -> torch.Tensor:
    """The delta of one TP rank as a dense matrix [local outputs, local inputs], through shrink and expand."""
    linear = spec.layers[layer][index]
    out = torch.zeros(linear.inputs.length, linear.out_offsets[-1], dtype=spec.dtype)
    descriptor = shard.descriptors[layer][index]
    if descriptor.h_width == 0:
        return out.t()
    factors = reference.read_linear(
        descriptor,
        shard.scalings[layer][index],
        tuple(image[layer]),
        torch.arange(shard.slots),
        linear.inputs.length,
        linear.out_offsets,
    )
    reference.add_delta_(out, torch.eye(linear.inputs.length, dtype=spec.dtype), slice(None), factors)
    return out.t()


def combined(folder: Path, model: ToyModel, size: int) -> dict[str, torch.Tensor]:
    """Dense delta of every slice or row linear, put together from all TP ranks."""
    specs = [model.spec(rank, size) for rank in range(size)]
    shards = [load_shard("a", folder, spec, max_rank=256) for spec in specs]
    result: dict[str, torch.Tensor] = {}
    for layer in range(model.layers):
        for index, linear in enumerate(specs[0].layers[layer]):
            parts = [rank_delta(*shard, spec, layer, index) for shard, spec in zip(shards, specs, strict=True)]
            if linear.kind == "row":
                total = torch.zeros(linear.outputs[0].size, linear.inputs.size, dtype=torch.float64)
                for part, spec in zip(parts, specs, strict=True):
                    own = spec.layers[layer][index].inputs
                    total[:, own.start : own.stop] += part[:, : max(own.size - own.start, 0)]
                    assert not part[:, max(own.size - own.start, 0) :].any(), "a delta from padding"
                (module,) = linear.sources
                result[module] = total
                continue
            for module, source in linear.sources.items():
                total = torch.full((source.size, linear.inputs.size), float("nan"), dtype=torch.float64)
                for part, spec in zip(parts, specs, strict=True):
                    own = spec.layers[layer][index]
                    for slice_index, offset in zip(source.slices, source.offsets, strict=True):
                        interval = own.outputs[slice_index]
                        start, stop = own.out_offsets[slice_index : slice_index + 2]
                        real = interval.within(offset, source.size)
                        total[real.start : real.stop] = part[start : start + real.length]
                        assert not part[start + real.length : stop].any(), "a delta on padding"
                result[module] = total
    return result


def check(model: ToyModel, size: int, **options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = write_adapter(folder, model, **options)
        found = combined(folder, model, size)
        for module, total in found.items():
            want = expected.get(module, torch.zeros_like(total))
            torch.testing.assert_close(total, want, rtol=1e-12, atol=1e-12)
        assert set(expected) <= set(found)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("nblocks", [None, 1, 2, 3, 4, 6, 8])
def test_every_block_count_at_every_tp_size(nblocks: int | None, size: int) -> None:
    check(ToyModel(layers=1), size, rank=24, nblocks=nblocks)


@settings(max_examples=120, deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12]),
    nblocks=st.sampled_from([None, 1, 2, 3, 4, 6, 8]),
    multiple=st.integers(1, 5),
    orientation=st.sampled_from(["right", "wrong"]),
    kv_heads=st.sampled_from([24, 12, 2, 1]),
    fused=st.booleans(),
    use_rslora=st.booleans(),
    targets=st.sampled_from([None, ("q_proj", "v_proj"), ("o_proj",), ("k_proj", "down_proj"), ("up_proj", "o_proj")]),
    seed=st.integers(0, 99),
)
def test_law(size, nblocks, multiple, orientation, kv_heads, fused, use_rslora, targets, seed) -> None:
    head_dim = 24 if kv_heads < 8 else 2  # so that every block count divides the K and V outputs
    model = ToyModel(layers=1, heads=24, kv_heads=kv_heads, head_dim=head_dim, fused=fused)
    if fused:
        targets = None
    rank = (nblocks or 1) * multiple
    check(
        model,
        size,
        rank=rank,
        nblocks=nblocks,
        orientation=orientation,
        targets=targets,
        seed=seed,
        use_rslora=use_rslora,
    )


def test_rank_and_alpha_pattern_differ_inside_a_fused_linear() -> None:
    for nblocks in (None, 2, 4):
        check(
            ToyModel(),
            4,
            rank=8,
            nblocks=nblocks,
            rank_pattern={"q_proj": 4, "up_proj": 12},
            alpha_pattern={"k_proj": 3.0, "down_proj": 1.5},
        )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_of_a_begin_on_vectors(size: int) -> None:
    """Kernels read rows of A eight elements at a time, where the row is a multiple of eight."""
    dense = 0
    for nblocks in (2, 4, 6, 8, 12, 16, 24, 48):
        for rank in range(size):
            linear = ToyModel(intermediate=96).spec(rank, size).layers[0][3]
            cut = cut_slice(linear, 0, 0, linear.outputs[0].size, ModuleShape(48, nblocks, "block_a"))
            assert cut.a_rows * cut.a.count == cut.rank
            if linear.inputs.length % 8 == 0 and cut.a.count > 1:
                assert (cut.a.size | cut.a.offset) % 8 == 0
            dense += cut.a.count == 1 and cut.rank > 48 // nblocks
    assert dense, "some are stored dense"
