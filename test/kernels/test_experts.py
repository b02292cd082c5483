"""One launch each of shrink and expand for all experts of a layer, in the interpreter, against float64."""

import numpy as np
import pytest
from blocklora_testing.kernels.cases import Part, Shape, build
from hypothesis import given, settings
from hypothesis import strategies as st

# A TP rank's part of an expert: gate and up in one, and down.
GATE_UP = Shape(40, (90, 90), ((30, 75), (30, 75)))
ALIGNED = Shape(40, (96, 96), ((32, 64), (32, 64)))
DOWN = Shape(56, (160,), ((40, 120),), row_parallel=True)
SHAPES = {"gate and up": GATE_UP, "aligned": ALIGNED, "down": DOWN}


def parts(rng: np.random.Generator, shape: Shape, owners: int) -> list[list[Part]]:
    """What each adapter has on each expert: nothing, a plain part, or one in blocks."""
    choices = [Part(0), Part(3), Part(8, 2), Part(17)]
    return [[choices[rng.integers(len(choices))] for _ in shape.local] for _ in range(owners)]


def routed(rng: np.random.Generator, tokens: int, adapters: int, experts: int, choices: int) -> np.ndarray:
    """``adapter * experts + expert`` of every pair of a token and a choice, -1 for tokens of the base model."""
    owners = rng.integers(-1, adapters, tokens)
    chosen = np.array([rng.permutation(experts)[:choices] for _ in range(tokens)]).reshape(tokens, choices)
    return np.where(owners[:, None] < 0, -1, owners[:, None] * experts + chosen).reshape(-1)


@pytest.mark.parametrize("captured_rank", [None, 1, 64], ids=["eager", "graph of rank 1", "graph of rank 64"])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_experts_at_once(interpreter, shape: Shape, tokens: int, captured_rank: int | None) -> None:
    adapters, experts, choices, rng = 3, 4, 2, np.random.default_rng(tokens)
    pairs = routed(rng, tokens, adapters, experts, choices)
    down = shape is DOWN
    weights = rng.random(len(pairs)).astype(np.float32) if down else None
    case = build(shape, parts(rng, shape, adapters * experts), pairs, choices=1 if down else choices, weights=weights)
    options = {"shared_x": not down, "weights": weights, "captured_rank": captured_rank}
    case.check(interpreter.run(case, experts=experts, choices=choices, **options))


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_routing(interpreter, data: st.DataObject) -> None:
    """Any number of tokens, adapters, experts and choices; the base model's rows are not touched."""
    adapters, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    choices, tokens = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 30))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    pairs = routed(rng, tokens, adapters, experts, choices)
    case = build(ALIGNED, parts(rng, ALIGNED, adapters * experts), pairs, choices=choices, dtype="float16")
    options = {"shared_x": True, "weights": None, "captured_rank": None}
    case.check(interpreter.run(case, experts=experts, choices=choices, **options))
