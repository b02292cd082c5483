"""The kernels, in Triton's interpreter, against the float64 answer of ``cases``."""

import dataclasses

import numpy as np
import pytest
from blocklora_testing.kernels.cases import DOWN, GATE_UP, MIXED, QKV, Part, Shape, build, zipf
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [pytest.param(shape, id=name) for name, shape in (("qkv", QKV), ("gate_up", GATE_UP), ("down", DOWN))]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_mixed_batch(interpreter, shape, dtype, contiguous):
    case = build(shape, MIXED[shape], zipf(21, 3), seed=1, dtype=dtype, stride=72, contiguous=contiguous)
    case.check(interpreter.run(case))


def test_matrices_that_start_anywhere(interpreter):
    """Widths that are no multiples of 8: nothing is read in vectors, so nothing needs to be aligned."""
    case = build(GATE_UP, MIXED[GATE_UP], zipf(21, 3), seed=1, alignment=1)
    case.check(interpreter.run(case))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(np.full(37, 1), id="one adapter for all"),
        pytest.param(np.array([2, 0, 1]), id="one adapter per token"),
        pytest.param(np.array([-1, -1]), id="base model alone"),
        pytest.param(np.empty(0, np.int64), id="empty batch"),
        pytest.param(np.repeat([1, -1, 0, 1], [9, 30, 1, 8]), id="prefill"),
    ],
)
def test_groupings(interpreter, shape, tokens):
    case = build(shape, MIXED[shape], tokens)
    case.check(interpreter.run(case))


def test_tiles_of_the_table(interpreter):
    """Tiles as a GPU runs them, decode and prefill."""
    for tokens in (zipf(9, 3), np.repeat([0, 1, 2], [200, 3, 70])):
        case = build(DOWN, MIXED[DOWN], tokens, dtype="float16")
        case.check(interpreter.run(case, small=False))


def test_rank_256(interpreter):
    shape = Shape(48, (80,), ((0, 80),))
    case = build(shape, [[Part(256)], [Part(255)]], np.array([0, 1, 0]), width=128, arena_slots=1024)
    case.check(interpreter.run(case))


def test_rank_0_leaves_out_untouched(interpreter):
    nothing = [Part(0), Part(0), Part(0)]
    case = build(QKV, [nothing, [Part(0), Part(3), Part(0)]], np.array([0, 1, 0]))
    case.out[:, :32] = np.nan  # an addition of zero would not show elsewhere
    case.expected[:, :32] = np.nan
    assert case.budget[:, 32:48].any()
    case.check(interpreter.run(case))


@pytest.mark.parametrize("width", [64, 104, 1024])
def test_row_widths_and_padded_x(interpreter, width):
    case = build(DOWN, MIXED[DOWN], zipf(8, 3), width=width, stride=width + 16)
    case.check(interpreter.run(case, x_padding=5))


@pytest.mark.parametrize("rank", [1, 8, 256])
def test_replay_with_other_segments(interpreter, rank):
    """A fixed grid and one set of buffers serve batches of other adapters, ranks and segment counts."""
    batches = [np.array([0, 1, 2, 2, -1, 0]), np.full(6, -1), np.full(6, 1), np.array([2, 1, 0, -1, -1, -1])]
    for order in (batches, batches[::-1]):
        case = build(GATE_UP, MIXED[GATE_UP], order[-1])
        case.check(interpreter.run(case, other_batches=tuple(order[:-1]), captured_rank=rank))


def test_repeats_bit_for_bit(interpreter):
    case = build(QKV, MIXED[QKV], zipf(20, 3))
    np.testing.assert_array_equal(interpreter.run(case), interpreter.run(case, other_batches=(zipf(20, 3, 1),)))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(160, (48, 48), ((0, 48), (16, 32))), id="column"),
        pytest.param(Shape(56, (320,), ((0, 160),), row_parallel=True), id="row"),
    ],
)
def test_a_token_gets_the_same_bits_in_every_batch(interpreter, shape):
    """With tiles that do not follow from the batch; with those that do it gets others, so this can fail."""
    tokens = zipf(40, 3)
    case = build(shape, [[Part(rank)] * len(shape.local) for rank in (5, 8, 3)], tokens)
    parts = {}
    for rows in (range(1), range(7, 0, -1), range(3, 40, 5), range(2, 30)):
        parts[rows] = dataclasses.replace(case, adapters=tokens[rows], x=case.x[rows], out=case.out[rows])
    for invariant in (True, False):
        whole = interpreter.run(case, invariant=invariant)
        case.check(whole)
        same = [np.array_equal(interpreter.run(p, invariant=invariant), whole[rows]) for rows, p in parts.items()]
        assert all(same) == invariant


@st.composite
def linears(draw):
    """A linear, cut anywhere (or where vectors can be read), and adapters of any ranks and blocks on it."""
    row_parallel = draw(st.booleans())
    unit = draw(st.sampled_from([1, 8]))
    slices = 1 if row_parallel else draw(st.integers(1, 3))
    full = tuple(24 * draw(st.integers(1, 4)) for _ in range(slices))
    cuts = [sorted(draw(st.lists(st.integers(0, f // unit), min_size=2, max_size=2, unique=True))) for f in full]
    width = unit * draw(st.integers(1, 48 // unit))
    shape = Shape(width, full, tuple((unit * a, unit * b) for a, b in cuts), row_parallel)
    part = st.sampled_from([1, 2, 3, 4, 6, 12]).flatmap(
        lambda n: st.integers(0, 24 // n).map(lambda per_block: Part(n * per_block, n))
    )
    count = draw(st.integers(1, 4))
    adapters = [[draw(part) for _ in range(slices)] for _ in range(count)]
    tokens = np.array(draw(st.lists(st.integers(-1, count - 1), max_size=20)), np.int64)
    return shape, adapters, tokens


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    linears(),
    st.sampled_from(["float16", "float32"]),
    st.sampled_from([64, 72]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_linear(interpreter, linear, dtype, width, contiguous, seed):
    shape, adapters, tokens = linear
    case = build(shape, adapters, tokens, seed=seed, dtype=dtype, width=width, contiguous=contiguous)
    case.check(interpreter.run(case))
