"""The kernels as a GPU runs them: bfloat16, the table's tiles, CUDA graphs, the side stream. Skipped without a GPU."""

import numpy as np
import pytest
import torch
from blocklora_kernels.batch import Captured
from blocklora_kernels.segments import Segments
from blocklora_kernels.side_stream import SideStream
from blocklora_testing.kernels.cases import DOWN, GATE_UP, MIXED, QKV, Part, Shape, build, zipf
from blocklora_testing.kernels.worker import as_request, set_up

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # Triton 3.9 announces another default for 3.10
]

# Local shapes of Llama-3.1-8B at TP 8 (qkv and down), block-diagonal and plain adapters.
QKV_8B = Shape(4096, (4096, 1024, 1024), ((512, 1024), (128, 256), (128, 256)))
DOWN_8B = Shape(4096, (14336,), ((1792, 3584),), row_parallel=True)
REAL = {
    QKV_8B: [[Part(16)] * 3, [Part(32, 8)] * 3, [Part(144, 8), Part(64), Part(0)]],
    DOWN_8B: [[Part(16)], [Part(32, 8)], [Part(64, 4)]],
}


def on_gpu(case, dtype):
    return set_up(as_request(case), "cuda", getattr(torch, dtype))


def result(out):
    return out.float().cpu().numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [QKV, GATE_UP, DOWN])
@pytest.mark.parametrize("tokens", [zipf(21, 3), np.full(37, 1), np.repeat([2, 0, -1, 1], [300, 5, 7, 90])])
def test_mixed_batch(shape, tokens, contiguous, dtype):
    case = build(shape, MIXED[shape], tokens, dtype=dtype, stride=72, contiguous=contiguous)
    linear, batch, x, out = on_gpu(case, dtype)
    batch.h.fill_(torch.nan)
    batch.update(Segments.build(tokens), len(x), case.rank)
    linear.add_delta_(out, x, batch)
    case.check(result(out))


@pytest.mark.parametrize("shape", REAL)
@pytest.mark.parametrize("tokens", [zipf(64, 3), np.repeat([2, 0, 1], [600, 100, 300])])
def test_real_shapes(shape, tokens):
    case = build(shape, REAL[shape], tokens, dtype="bfloat16", width=128, arena_slots=1 << 15)
    linear, batch, x, out = on_gpu(case, "bfloat16")
    batch.update(Segments.build(tokens), len(x), case.rank)
    linear.add_delta_(out, x, batch)
    case.check(result(out))


def test_a_known_variant_is_launched_alike():
    """The second launch of a linear goes past Triton's own launcher."""
    case = build(QKV, MIXED[QKV], np.array([1]), dtype="bfloat16")  # one token: as many splits as there are
    linear, batch, x, out = on_gpu(case, "bfloat16")
    batch.update(Segments.build(case.adapters), len(x), case.rank)
    for again in (out, out.clone()):
        linear.add_delta_(again, x, batch)
        case.check(result(again))


@pytest.mark.parametrize("tokens", [zipf(64, 3), np.repeat([2, 0, 1], [600, 100, 300])])
def test_expand_launched_while_shrink_ends(tokens):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = build(QKV_8B, REAL[QKV_8B], tokens, dtype="bfloat16", width=128, arena_slots=1 << 15)
    linear, batch, x, out = on_gpu(case, "bfloat16")
    linear.dependent, linear.debug = True, False
    batch.update(Segments.build(tokens), len(x), case.rank)
    for _ in range(20):  # h of the pass before would be wrong too: it is not a number
        batch.h.fill_(torch.nan)
        again = out.clone()
        linear.add_delta_(again, x, batch)
        case.check(result(again))


def test_graph_of_prefill_replays_other_batches():
    """Of fewer tokens, more adapters and other ranks than it was captured for."""
    sizes = (600, 290, 1)
    batches = [np.append(zipf(n, 3, n), np.full(600 - n, -1)) for n in sizes]
    cases = [build(GATE_UP, MIXED[GATE_UP], tokens, dtype="bfloat16") for tokens in batches]
    linear, batch, x, out = on_gpu(cases[0], "bfloat16")
    linear.debug = False
    captured = Captured(600, 1)
    batch.update_for_capture(captured)
    before = out.clone()
    linear.add_delta_(out, x, batch)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        linear.add_delta_(out, x, batch)
    for tokens, case in zip(sizes, cases, strict=True):
        out.copy_(before)
        batch.update(Segments.build(case.adapters[:tokens]), tokens, case.rank, captured)
        graph.replay()
        case.check(result(out))


def test_graph_replays_other_batches():
    batches = [zipf(24, 3, seed) for seed in range(4)] + [np.full(24, -1), np.full(24, 2)]
    cases = [build(QKV, MIXED[QKV], tokens, dtype="bfloat16") for tokens in batches]
    linear, batch, x, out = on_gpu(cases[0], "bfloat16")
    linear.debug = False  # the check copies to the host, which a capture forbids
    captured = Captured(24, 16)
    batch.update_for_capture(captured)
    before = out.clone()
    linear.add_delta_(out, x, batch)  # compiles
    graph, side = torch.cuda.CUDAGraph(), SideStream(out.device)
    with torch.cuda.graph(graph):
        with side.fork():
            linear.shrink(x, batch)
        side.join()
        linear.expand_(out, batch)
    for case in cases:
        out.copy_(before)
        batch.update(Segments.build(case.adapters), 24, case.rank, captured)
        graph.replay()
        first = out.clone()
        case.check(result(out))
        out.copy_(before)
        graph.replay()
        assert torch.equal(first, out)
