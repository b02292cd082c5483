"""The torch reference against the same float64 answer as the kernels."""

import numpy as np
import pytest
import torch
from blocklora_kernels.reference import add_delta_, read_linear
from blocklora_kernels.segments import Segments
from blocklora_testing.kernels.cases import MIXED, Part, Shape, build, zipf


def run(case) -> np.ndarray:
    out, x = torch.from_numpy(case.out.copy()), torch.from_numpy(case.x)
    planes = [torch.from_numpy(plane) for plane in case.planes]
    segments = Segments.build(case.adapters)
    for i, adapter in enumerate(segments.adapters.tolist()):
        if case.descriptors[adapter].h_width == 0:
            continue
        factors = read_linear(
            case.descriptors[adapter],
            case.scalings[adapter].tolist(),
            planes,
            torch.from_numpy(case.slots[adapter]),
            case.in_features,
            case.out_offsets,
        )
        add_delta_(out, x, segments.rows(i), factors)
    return out.numpy()


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", MIXED)
@pytest.mark.parametrize("tokens", [zipf(21, 3), np.full(5, 1), np.empty(0, np.int64), np.array([2, 0, 1])])
def test_reference(shape, tokens, contiguous):
    case = build(shape, MIXED[shape], tokens, contiguous=contiguous)
    case.check(run(case))


@pytest.mark.parametrize("seed", range(10))
def test_reference_at_any_cut(seed):
    rng = np.random.default_rng(seed)
    start, stop = np.sort(rng.choice(73, 2, replace=False)).tolist()
    part = [Part(12 * int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 4, 6, 12])))]
    for row_parallel in (False, True):
        case = build(Shape(33, (72,), ((start, stop),), row_parallel), [part, [Part(0)]], zipf(9, 2, seed), seed=seed)
        case.check(run(case))
