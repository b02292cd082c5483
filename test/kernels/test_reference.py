"""The torch reference against the same float64 answer as the kernels."""

import numpy as np
import pytest
import torch
from blocklora_kernels.descriptor import Blocks
from blocklora_kernels.reference import ExpandFactor, LinearFactors, add_delta_, read_linear
from blocklora_kernels.segments import Segments
from blocklora_kernels.stacked import add_deltas_, foreign, stack
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_added_up_in_float32(dtype):
    """Sums of 4,096 terms, from adapter to adapter and all at once, lie within two roundings of float64's."""
    generator = torch.Generator().manual_seed(0)
    tokens, inputs, rank, outputs, scaling = 6, 4096, 8, 12, 0.5

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def factors() -> LinearFactors:
        whole_in, whole_out = Blocks(1, inputs, 0), Blocks(1, outputs, 0)
        b = rand(rank, outputs).t()
        return LinearFactors(
            rank, rand(rank, inputs) / 64, whole_in, (ExpandFactor(b, 0, rank, whole_out, 0, scaling),)
        )

    x, base, own = rand(tokens, inputs), rand(tokens, outputs), [factors(), factors()]
    adapters = torch.tensor([0, 1, 1, 0, 0, 1])
    expected = base.double()
    for i, factor in enumerate(own):
        h = x.double() @ factor.a.double().t()
        expected[adapters == i] += (scaling * h @ factor.slices[0].weight.double().t())[adapters == i]
    one_by_one, at_once = base.clone(), base.clone()
    for i, factor in enumerate(own):
        add_delta_(one_by_one, x, torch.where(adapters == i)[0], factor)
    stacked = stack(own)
    assert stacked is not None
    assert stacked.a.dtype == torch.float32
    add_deltas_(at_once, x, stacked, foreign(adapters, stacked.owners))
    size = expected.abs().max().item()
    for out, roundings in ((one_by_one, 2), (at_once, 1)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=roundings * size * torch.finfo(dtype).eps / 2)
