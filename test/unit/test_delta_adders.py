"""A step of the batch on the torch and the Triton path adds what dense algebra says, for mixed batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocklora_testing.kernels.in_interpreter import in_interpreter
from blocklora_testing.pools import loaded_pool
from blocklora_testing.toy import ToyModel, write_adapter
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.batch import torch_adder
from sglang_blocklora.batch.delta_adder import DeltaAdder
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.memory.loaded import LoadedAdapter

MODEL = ToyModel(layers=2)
CHOICES = {
    "plain": {"rank": 5},
    "n2": {"rank": 6, "nblocks": 2, "use_rslora": True},
    "n3": {"rank": 12, "nblocks": 3, "targets": ("q_proj", "v_proj", "o_proj", "down_proj")},
}


def make(folder: Path, rank: int, size: int, step_class: type, slots: int):
    """A pool with the three adapters on a TP rank, its step, and the adapters' dense deltas."""
    spec = MODEL.spec(rank, size, torch.float32)
    deltas = {
        name: write_adapter(folder / name, MODEL, seed=seed, **options)
        for seed, (name, options) in enumerate(CHOICES.items())
    }
    pool = loaded_pool(spec, {name: folder / name for name in CHOICES}, slots)
    options = () if step_class is TorchAdder else (16, torch.device("cpu"), "stream" if rank == 1 else "off")
    step = step_class(spec, pool, *options)
    return spec, pool, step, deltas


def check(spec, step: DeltaAdder, deltas, keys: list[str | None], counts: list[int] | None) -> None:
    """Every linear's output after the step, against the dense deltas of the rank's rows and columns."""
    step.prepare(keys, counts)
    per_token = [key for key, count in zip(keys, counts or [1] * len(keys), strict=True) for _ in range(count)]
    generator = torch.Generator().manual_seed(len(per_token))
    for i, layer in enumerate(spec.layers):
        for j, linear in enumerate(layer):
            x = torch.randn(len(per_token), linear.inputs.length, generator=generator)
            base = torch.randn(len(per_token), linear.out_offsets[-1], generator=generator)
            expected = base.double()
            for module, source in linear.sources.items():
                (index,) = source.slices
                rows, (start, stop) = linear.outputs[index], linear.out_offsets[index : index + 2]
                for t, key in enumerate(per_token):
                    if key in deltas and module in deltas[key]:
                        delta = deltas[key][module][rows.start : rows.stop, linear.inputs.start : linear.inputs.stop]
                        expected[t, start:stop] += delta @ x[t].double()
            out = base.clone()
            step.start(i, j, x)
            step.add_delta_(i, j, out, x)
            torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-3)


def check_batches(folder: Path, step_class: type) -> None:
    """Prefill, decode, base only, unknown keys, adapters that come and go; on both ranks of TP 2."""
    for rank in (0, 1):
        spec, pool, step, deltas = make(folder / str(rank), rank, 2, step_class, slots=40)
        assert not pool.bring_in(CHOICES), "all three fit: nothing would come and go"
        batches: list[tuple[list[str | None], list[int] | None]] = [
            (["plain", None, "n2", "plain"], [3, 4, 1, 6]),
            (["n3", "plain", None, "n3"], None),
            ([None, None], None),
            ([None], [5]),
            (["n2", "unloaded", "n2"], [2, 3, 1]),
            (["n3"], [7]),
            (["n2", "n3"], None),
        ]
        for keys, counts in [batch for batch in batches for _ in range(2)]:
            assert pool.bring_in(key for key in keys if key)
            pool.begin_step(key for key in keys if key)
            check(spec, step, deltas, keys, counts)
            pool.check_integrity()


def test_torch_adder(tmp_path: Path) -> None:
    check_batches(tmp_path, TorchAdder)


def test_small_batches_of_the_same_adapters_are_added_at_once(tmp_path: Path) -> None:
    """From the second one on, also with fewer of them; not a batch of many tokens, of others."""
    spec, pool, step, deltas = make(tmp_path, 0, 2, TorchAdder, slots=200)
    assert pool.bring_in(CHOICES)
    pool.begin_step(CHOICES)
    batches: list[tuple[list[str | None], list[int] | None, bool]] = [
        (["n2", "plain"], None, False),
        (["plain", None, "n2", "plain"], [3, 4, 1, 6], True),
        (["n2", "plain", "n2"], [1, 126, 2], False),
        (["n2", "plain", "n3"], None, False),
        (["n2", "plain", None, "n3"], None, True),
        (["n3", "n2"], None, True),
        (["n3"], None, False),
        (["n3", None], None, True),
        (["n2", "plain", "n3"], None, False),
        (["n2", "plain", "n3"], None, True),
    ]
    for keys, counts, at_once in batches:
        check(spec, step, deltas, keys, counts)
        assert (step._stacked is not None) == at_once, keys
    pool.remove("n2")
    deltas["n2"] = write_adapter(tmp_path / "other", MODEL, seed=9, rank=4)
    shard, image = load_shard("n2", tmp_path / "other", spec, 64)
    other = LoadedAdapter(
        name="n2", path="", shard=shard, slots=shard.slots, pinned=False, content_hash="2", image_digest=""
    )
    pool.add("n2", other, image)
    assert pool.bring_in(CHOICES)
    pool.begin_step(CHOICES)
    for at_once in (False, True):
        check(spec, step, deltas, ["n3", "n2"], None)
        assert (step._stacked is not None) == at_once


def test_copies_of_small_batches_are_bounded_by_what_they_take(tmp_path: Path, monkeypatch) -> None:
    """Blocks are written out in them, which takes more than the arena's rows."""
    _, pool, step, _ = make(tmp_path, 0, 1, TorchAdder, slots=400)
    assert pool.bring_in(CHOICES)
    pool.begin_step(CHOICES)
    for _ in range(2):
        step.prepare(["n2", "n3"], None)
    taken = sum(
        tensor.nbytes
        for layer in step._stack.layers
        for known in layer
        if known is not None
        for tensor in (known[0].a, *(one.b for one in known[0].slices))
    )
    rows = pool.loaded["n2"].slots + pool.loaded["n3"].slots
    assert taken > rows * sum(plane.shape[1] * plane.itemsize for layer in pool.arena.planes for plane in layer)
    for bound, stacked in ((taken, True), (taken - 1, False)):
        monkeypatch.setattr(torch_adder, "MOST_STACKED_BYTES", bound)
        step._stack = None
        step.prepare(["n2", "n3"], None)
        assert (step._stacked is not None) == stacked


def test_an_adapter_that_overflows_changes_nothing_of_others(tmp_path: Path) -> None:
    """Its factors meet everybody's tokens: what they make of those is no number, and must not be added."""
    spec, pool, step, _ = make(tmp_path, 0, 2, TorchAdder, slots=200)
    assert pool.bring_in(CHOICES)
    pool.begin_step(CHOICES)
    arena, resident = pool.arena, pool.resident["plain"]
    for planes in arena.planes:
        for plane in planes:
            plane[resident.slots] = 3e38
    for at_once in (False, True):
        step.prepare(["plain", "n2", None], None)
        assert (step._stacked is not None) == at_once
        linear = spec.layers[0][0]
        x = torch.ones(3, linear.inputs.length)
        out = torch.zeros(3, linear.out_offsets[-1])
        step.add_delta_(0, 0, out, x)
        assert not out[0].isfinite().all(), "the adapter does not overflow: the test shows nothing"
        assert out[1].isfinite().all()
        assert out[1].any()
        assert not out[2].any()


def test_triton_adder_in_the_interpreter(tmp_path: Path) -> None:
    in_interpreter(__file__, tmp_path, "check_triton")


def check_triton(folder: Path) -> None:
    """Run where the interpreter is on."""
    from sglang_blocklora.batch.triton_adder import TritonAdder

    check_batches(folder, TritonAdder)
    check_graph_metadata(folder / "graph", TritonAdder)
    check_invariance(folder / "invariance", TritonAdder)


def check_invariance(folder: Path, step_class: type) -> None:
    """Where a token's bits may not follow from its batch, nothing that sums are cut by does."""
    spec, pool, _, _ = make(folder, 0, 2, step_class, slots=200)
    assert pool.bring_in(CHOICES)
    pool.begin_step(CHOICES)
    for invariant in (False, True):
        step = step_class(spec, pool, 16, torch.device("cpu"), max_tokens=300, invariant=invariant)
        found = set()
        for keys, counts in ((["plain"], [290]), (["n3", "n2"], None)):
            step.prepare(keys, counts)
            found.add((step._batch.tiling, step._batch.rank))
        assert (len(found) == 1) == invariant
    assert {(tiling.most_splits, rank) for tiling, rank in found} == {(1, 16)}


def check_graph_metadata(folder: Path, step_class: type) -> None:
    """A batch gets the tiles of the smallest captured graph that holds it, and runs right without the graph."""
    spec, pool, step, deltas = make(folder, 0, 2, step_class, slots=200)
    for kind, largest in (("decode", 8), ("prefill", 16)):
        step.init_graphs(kind, largest)
        for size in (largest, 2, 4):
            step.prepare_capture(kind, size)
            assert step._batch.grid_tiles == step._batch.most_tiles(size)
    decode, prefill = (step._graphs[kind].batch for kind in ("decode", "prefill"))
    addresses = [batch._buffer.data_ptr() for batch in (decode, prefill)]
    for keys, counts, expected in (
        (["plain", "n2", None], None, decode),
        ([None], None, None),  # replays a graph without adapters
        (["gone", None], None, decode),  # for upstream a batch with adapters
        (["n3", "n2", "plain", "n3"], None, decode),
        (["plain"] * 8, None, decode),
        (["n2"] * 9, None, step._eager),
        (["n2", "n3"], [3, 2], prefill),
        ([None], [5], prefill),  # there is no prefill graph without adapters
        ([None], [50], None),
        (["n2", None, "n3"], [3, 14, 2], step._eager),
    ):
        assert pool.bring_in(key for key in keys if key in CHOICES)
        pool.begin_step(key for key in keys if key in CHOICES)
        check(spec, step, deltas, keys, counts)
        assert step._batch is expected
        if expected is not None:
            assert int(expected.tiles[0]) == len({key for key in keys if key in CHOICES}), "stale tiles are replayed"
            assert expected.rank == (step._graphs["decode"]._rank if expected is not step._eager else expected.rank)
    assert addresses == [batch._buffer.data_ptr() for batch in (decode, prefill)], "graphs would read old addresses"


@pytest.mark.parametrize("method", ["init_graphs", "prepare_capture"])
def test_torch_adder_refuses_cuda_graphs(tmp_path: Path, method: str) -> None:
    _, _, step, _ = make(tmp_path, 0, 1, TorchAdder, slots=200)
    with pytest.raises(ValueError, match="--disable-cuda-graph"):
        getattr(step, method)("decode", 4)
