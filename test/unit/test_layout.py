"""Layout of rows: every element has one address, and little is wasted."""

from __future__ import annotations

import pytest
import torch
from blocklora_kernels import reference
from blocklora_testing.toy import ToyModel
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS, place
from sglang_blocklora.sharding.plan import most_slots, plan_linear

# hidden, query heads, KV heads, head dimension, intermediate
MODELS = {
    "Llama-3.1-8B": (4096, 32, 8, 128, 14336),
    "Llama-3.1-70B": (8192, 64, 8, 128, 28672),
    "Qwen2.5-7B": (3584, 28, 4, 128, 18944),
    "Mistral-7B": (4096, 32, 8, 128, 14336),
}


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=12), row_width=st.sampled_from([8, 24, 64, 100]))
def test_every_element_has_exactly_one_address(sizes: list[int], row_width: int) -> None:
    layout = place(sizes, row_width)
    planes = torch.full((2, layout.rows, row_width), -1)
    for index, (size, address) in enumerate(zip(sizes, layout.addresses, strict=True)):
        start = address.row * row_width + address.column
        if size:
            assert start % ALIGNMENT_ELEMENTS == 0
        own = planes[address.plane].view(-1)[start : start + size]
        assert len(own) == size, "the matrix leaves the layer's rows"
        assert (own == -1).all(), "two matrices overlap"
        own.fill_(index)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    others=st.lists(st.integers(1, 300), max_size=4),
    row_width=st.sampled_from([8, 40, 64]),
    scattered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_read_matrix_finds_what_was_written(shape, others, row_width, scattered, seed) -> None:
    """Adjacent slots (a view) and scattered ones (a copy) give the same matrix; nothing else is read."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    layout = place([*others, rows * columns], row_width)
    address = layout.addresses[-1]
    arena = torch.full((2, 3 * layout.rows + 5, row_width), float("nan"))
    slots = torch.randperm(arena.shape[1], generator=generator)[: layout.rows] if scattered else None
    if slots is None:
        slots = torch.arange(3, 3 + layout.rows)
    want = torch.randn(rows, columns, generator=generator)
    image = torch.full((2, layout.rows, row_width), float("nan"))
    start = address.row * row_width + address.column
    image[address.plane].view(-1)[start : start + rows * columns] = want.view(-1)
    arena[:, slots] = image
    found = reference.read_matrix(tuple(arena), slots, address, rows, columns)
    assert torch.equal(found, want)


@pytest.mark.parametrize(
    ("model", "tp"),
    [(model, tp) for model in MODELS for tp in (1, 2, 4, 8) if MODELS[model][1] % tp == 0],  # SGLang's own condition
)
@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
def test_padding_is_at_most_three_percent(model: str, tp: int, block_diagonal: bool, rank: int) -> None:
    hidden, heads, kv_heads, head, intermediate = MODELS[model]
    q, kv, ffn = heads * head // tp, max(kv_heads // tp, 1) * head, intermediate // tp
    r = rank // tp if block_diagonal else rank
    sizes = [3 * r * hidden, q * r, kv * r, kv * r, r * q, hidden * r]
    sizes += [2 * r * hidden, ffn * r, ffn * r, r * ffn, hidden * r]
    layout = place(sizes, kv)
    assert 2 * layout.rows * kv <= 1.03 * sum(sizes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_no_adapter_needs_more_slots_than_the_most(data) -> None:
    """Of any ranks, blocks and orientations, on the modules of any TP rank; the kernels' table has no more room."""
    size = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    model = ToyModel(layers=1, fused=data.draw(st.booleans()))
    spec = model.spec(data.draw(st.integers(0, size - 1)), size, row_width=data.draw(st.sampled_from([8, 40])))
    max_rank = 24
    most = most_slots(spec, max_rank)
    shapes = {}
    for module in model.shapes(0):
        blocks = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
        structure = data.draw(st.sampled_from(["plain", "block_a", "block_b"]))
        rank = data.draw(st.integers(1, max_rank // blocks)) * blocks
        if data.draw(st.booleans()):
            shapes[module] = ModuleShape(rank, 1 if structure == "plain" else blocks, structure)
    plans = [plan_linear(linear, shapes, spec) for linear in spec.layers[0]]
    assert place([elements for plan in plans for elements in plan.sizes()], spec.row_width).rows <= most
    plain = {module: ModuleShape(max_rank, 1, "plain") for module in model.shapes(0)}
    plans = [plan_linear(linear, plain, spec) for linear in spec.layers[0]]
    largest = place([elements for plan in plans for elements in plan.sizes()], spec.row_width).rows
    assert largest <= most <= 1.5 * largest + 1, "far more than the largest adapter needs"
