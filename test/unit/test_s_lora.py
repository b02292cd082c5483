"""S-LoRA's sharding of plain adapters, as the benchmarks run it: its law, its collectives, what it leaves alone."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import ToyModel, host_only_images, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_blocklora.adapters import shard
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.memory.decisions import DecisionLog
from sglang_blocklora.memory.eviction import LRU
from sglang_blocklora.memory.loaded import LoadedAdapter
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.memory.static_pool import StaticPool

from benchmark.paper.s_lora.sharding import plan_linear
from benchmark.paper.s_lora.step import SplitStep

TIMEOUT_S = 60


@pytest.fixture(scope="module", autouse=True)
def cut_s_loras_way() -> Iterator[None]:
    """What the benchmark's launcher does to a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "plan_linear", plan_linear)
        yield


class ThreadGroup:
    """TP ranks as threads. A rank that makes another call, or none, breaks the barrier instead of hanging the test."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[list[str]] = [[] for _ in range(size)]
        self._values: list[tuple[str, torch.Tensor] | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=TIMEOUT_S)

    def exchange(self, rank: int, name: str, values: torch.Tensor) -> list[torch.Tensor]:
        self.calls[rank].append(name)
        self._values[rank] = (name, values.clone())
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        assert {(other, part.shape) for other, part in found} == {(name, values.shape)}
        return [part for _, part in found]

    def finish(self, rank: int) -> None:
        """The rank makes no further call."""
        self.exchange(rank, "finish", torch.zeros(0))


@dataclasses.dataclass(frozen=True)
class ThreadRank:
    group: ThreadGroup
    rank: int

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.group.exchange(self.rank, "all_gather", values))

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.group.exchange(self.rank, "all_reduce", values)).sum(0)


def run_rank(
    model: ToyModel, group: ThreadGroup, rank: int, folders: dict[str, Path], keys: list, inputs: list
) -> list[list[torch.Tensor]]:
    """Deltas [layer][linear] of one TP rank for a batch of one token a request, ``inputs`` [layer][linear] whole."""
    spec = model.spec(rank, group.size)
    arena = StaticArena(model.layers, 4096, spec.row_width, spec.dtype, torch.device("cpu"))
    arena._rows.fill_(float("nan"))
    pool = StaticPool(arena, 8, host_only_images(), DecisionLog(None, 0), LRU())
    for name, folder in folders.items():
        own, image = load_shard(name, folder, spec, 64)
        pool.add(
            name,
            LoadedAdapter(
                name=name, path="", shard=own, slots=own.slots, pinned=False, content_hash="", image_digest=""
            ),
            image,
        )
    assert pool.bring_in(folders)
    pool.begin_step(folders)
    step = SplitStep(spec, pool, ThreadRank(group, rank))
    step.prepare(keys, None)
    deltas = []
    for i, layer in enumerate(spec.layers):
        deltas.append([])
        for j, linear in enumerate(layer):
            real = linear.inputs.real
            x = torch.zeros(len(keys), linear.inputs.length, dtype=spec.dtype)
            x[:, : real.length] = inputs[i][j][:, real.start : real.stop]
            out = torch.zeros(len(keys), linear.out_offsets[-1], dtype=spec.dtype)
            step.add_delta_(i, j, out, x)
            deltas[-1].append(out)
    group.finish(rank)
    return deltas


def check(model: ToyModel, size: int, adapters: dict[str, dict], keys: list[str | None]) -> ThreadGroup:
    """A mixed batch on all TP ranks against dense algebra; returns the group, which knows the calls."""
    generator = torch.Generator().manual_seed(len(keys))
    with tempfile.TemporaryDirectory() as name:
        folders = {key: Path(name) / key for key in adapters}
        dense = {key: write_adapter(folders[key], model, **options) for key, options in adapters.items()}
        layers = model.spec(0, size).layers
        inputs = [
            [torch.randn(len(keys), one.inputs.size, generator=generator, dtype=torch.float64) for one in layer]
            for layer in layers
        ]
        group = ThreadGroup(size)
        with ThreadPoolExecutor(size) as pool:
            runs = [pool.submit(run_rank, model, group, rank, folders, keys, inputs) for rank in range(size)]
            found = [run.result() for run in runs]
    for i, layer in enumerate(layers):
        for j, linear in enumerate(layer):
            for module, source in linear.sources.items():
                zero = torch.zeros(source.size, linear.inputs.size, dtype=torch.float64)
                want = torch.stack(
                    [
                        (dense[key].get(module, zero) if key else zero) @ x
                        for key, x in zip(keys, inputs[i][j], strict=True)
                    ]
                )
                if linear.kind == "row":
                    got = sum(found[rank][i][j] for rank in range(size))
                    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
                    continue
                for rank in range(size):
                    own = model.spec(rank, size).layers[i][j]
                    for index, offset in zip(source.slices, source.offsets, strict=True):
                        rows = own.outputs[index].within(offset, source.size)
                        start, stop = own.out_offsets[index : index + 2]
                        part = found[rank][i][j][:, start:stop]
                        torch.testing.assert_close(
                            part[:, : rows.length], want[:, rows.start : rows.stop], rtol=1e-11, atol=1e-11
                        )
                        assert not part[:, rows.length :].any(), "a delta on padding"
    return group


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([2, 3, 4, 5, 8]),
    rank=st.integers(1, 11),
    other_rank=st.sampled_from([2, 4, 12]),
    kv_heads=st.sampled_from([24, 2, 1]),
    fused=st.booleans(),
    targets=st.sampled_from([None, ("q_proj", "v_proj"), ("o_proj",), ("k_proj", "down_proj"), ("up_proj", "o_proj")]),
    keys=st.lists(st.sampled_from(["plain", "other", "bd", None]), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_law(size, rank, other_rank, kv_heads, fused, targets, keys, seed) -> None:
    """Any LoRA rank, also less than the TP size; replicated KV heads; padded ranks; mixed batches."""
    model = ToyModel(layers=1, kv_heads=kv_heads, head_dim=24 if kv_heads < 8 else 2, fused=fused)
    adapters = {
        "plain": {"rank": rank, "seed": seed, "targets": None if fused else targets},
        "other": {"rank": other_rank, "seed": seed + 1},
        "bd": {"rank": 4, "nblocks": 2, "seed": seed + 2},
    }
    check(model, size, adapters, keys)


def test_ranks_that_differ_inside_a_fused_linear() -> None:
    check(ToyModel(), 4, {"a": {"rank": 6, "rank_pattern": {"q_proj": 3, "up_proj": 9}}}, ["a", None, "a"])


LAYER = ["all_gather", "all_reduce", "all_gather", "all_reduce"]  # qkv, o, gate_up, down


@pytest.mark.parametrize(
    ("keys", "calls"),
    [
        (["plain"], LAYER * 2),
        (["bd", "plain", None, "other", "plain"], LAYER * 2),  # one collective for all of them
        (["bd", None, "wrong", "bd"], []),  # block-diagonal requests never need one
        ([None], []),
        (["attention"], ["all_gather", "all_reduce"] * 2),  # nothing for linears that are left alone
    ],
)
def test_collectives_of_a_forward(keys: list[str | None], calls: list[str]) -> None:
    adapters = {
        "plain": {"rank": 8},
        "other": {"rank": 6},
        "bd": {"rank": 8, "nblocks": 4},
        "wrong": {"rank": 8, "nblocks": 4, "orientation": "wrong"},
        "attention": {"rank": 4, "targets": ("q_proj", "o_proj")},
    }
    group = check(ToyModel(), 4, adapters, keys)
    assert group.calls == [[*calls, "finish"]] * 4


def test_each_rank_reads_its_share_only(tmp_path: Path) -> None:
    """Bytes of the shards: replicate keeps one factor of every linear whole, S-LoRA none (r and out divide here)."""
    model = ToyModel(layers=1)
    write_adapter(tmp_path, model, rank=8)
    parameters = sum(8 * (rows + columns) for rows, columns in model.shapes(0).values())
    for rank in range(4):
        spec = dataclasses.replace(model.spec(rank, 4), row_width=8)
        _, image = load_shard("a", tmp_path, spec, 64)
        assert image.numel() == pytest.approx(parameters / 4, rel=0.05)
