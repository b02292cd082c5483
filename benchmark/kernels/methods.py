"""What is compared: each method is a function of one copy's index that adds the delta of the whole batch to ``out``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from blocklora_kernels.batch import cut_into_tiles
from problem import Problem

Run = Callable[[int], object]
MOST_GATHERED_BYTES = 8 << 30


def ours(p: Problem) -> Run:
    return lambda copy: p.ours[copy].add_delta_(p.out, p.x, p.batch)


def _batch_info(p: Problem, chunk: int):
    """SGLang's metadata: tokens sorted by adapter, segments of at most ``chunk`` tokens."""
    from sglang.srt.lora.utils import LoRABatchInfo

    segment, first, stop = cut_into_tiles(p.segments.starts, chunk)
    adapters = p.a.shape[1]

    def on_gpu(values):
        return torch.as_tensor(values, dtype=torch.int32, device="cuda")

    return LoRABatchInfo(
        use_cuda_graph=False,
        bs=len(segment),
        num_segments=len(segment),
        seg_indptr=on_gpu([*first.tolist(), int(stop[-1])]),
        weight_indices=on_gpu(p.segments.adapters[segment]),
        lora_ranks=on_gpu([p.rank] * adapters),
        scalings=torch.ones(adapters, device="cuda"),
        max_len=int((stop - first).max()),
        seg_lens=on_gpu(stop - first),
        permutation=on_gpu(p.segments.tokens),
    )


def sglang_triton(p: Problem) -> Run:
    """The ``triton`` backend's kernels on merged segments, as its CUDA graph path runs them."""
    from sglang.kernels.ops.gemm.gate_up_lora_b import gate_up_lora_b_fwd
    from sglang.kernels.ops.gemm.qkv_lora_b import qkv_lora_b_fwd
    from sglang.kernels.ops.gemm.sgemm_lora_a import sgemm_lora_a_fwd
    from sglang.kernels.ops.gemm.sgemm_lora_b import sgemm_lora_b_fwd

    info = _batch_info(p, len(p.x))
    outputs = p.linear.outputs
    offsets = torch.tensor(p.out_offsets, dtype=torch.int32, device="cuda")

    def run(copy: int) -> object:
        h = sgemm_lora_a_fwd(p.x, p.a[copy], info, stack_num=len(outputs))
        if len(outputs) == 3:
            return qkv_lora_b_fwd(h, p.b[copy], info, offsets, max(outputs), p.out)
        if len(outputs) == 2:
            return gate_up_lora_b_fwd(h, p.b[copy], info, outputs[0], p.out)
        return sgemm_lora_b_fwd(h, p.b[copy], info, p.out)

    return run


def sglang_csgmv(p: Problem) -> Run:
    """The ``csgmv`` backend's kernels with the chunk size that it picks for the batch."""
    from sglang.kernels.ops.gemm.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.gemm.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward

    chunk = 128 if len(p.x) >= 256 else 32 if len(p.x) >= 64 else 16
    info = _batch_info(p, chunk)
    info.max_len = chunk
    offsets = torch.tensor(p.out_offsets, dtype=torch.int32, device="cuda")
    slices = len(p.linear.outputs)

    def run(copy: int) -> object:
        h = chunked_sgmv_lora_shrink_forward(p.x, p.a[copy], info, slices)
        return chunked_sgmv_lora_expand_forward(h, p.b[copy], info, offsets, max(p.linear.outputs), p.out)

    return run


def torch_bmm(p: Problem) -> Run | None:
    """Weights gathered for each token, then ``bmm``; the gather is part of the time. None where it does not fit."""
    gathered = (p.a[0, 0].numel() + p.b[0, 0].numel()) * len(p.segments.tokens) * p.a.element_size()
    if gathered > MOST_GATHERED_BYTES:
        return None
    counts = torch.from_numpy(p.segments.starts).diff()
    adapters = torch.repeat_interleave(torch.from_numpy(p.segments.adapters), counts).long().cuda()
    tokens = torch.from_numpy(p.segments.tokens).long().cuda()

    def run(copy: int) -> object:
        h = torch.bmm(p.a[copy][adapters], p.x[tokens].unsqueeze(2))
        b = p.b[copy][adapters]
        parts = []
        for s, (start, stop) in enumerate(zip(p.out_offsets, p.out_offsets[1:], strict=False)):
            parts.append(torch.bmm(b[:, start:stop], h[:, s * p.rank : (s + 1) * p.rank]).squeeze(2))
        return p.out.index_add_(0, tokens, torch.cat(parts, 1))

    return run


def flashinfer_segment_gemm(p: Problem) -> Run | None:
    """flashinfer's segment GEMM on tokens already sorted; one slice at a time. None where it is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    wrapper = flashinfer.SegmentGEMMWrapper(torch.empty(128 << 20, dtype=torch.int8, device="cuda"))
    tokens = torch.from_numpy(p.segments.tokens).long().cuda()
    starts = torch.from_numpy(p.segments.starts).long().cuda()
    adapters = torch.from_numpy(p.segments.adapters).long().cuda()
    groups = len(p.segments.adapters)

    def gemm(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return wrapper.run(x, weights, groups, True, seg_indptr=starts, weight_indices=adapters)

    def run(copy: int) -> object:
        h = gemm(p.x[tokens], p.a[copy])
        parts = []
        for s, (start, stop) in enumerate(zip(p.out_offsets, p.out_offsets[1:], strict=False)):
            part = h[:, s * p.rank : (s + 1) * p.rank].contiguous()
            parts.append(gemm(part, p.b[copy][:, start:stop].contiguous()))
        return p.out.index_add_(0, tokens, torch.cat(parts, 1))

    return run


METHODS: dict[str, Callable[[Problem], Run | None]] = {
    "ours": ours,
    "sglang triton": sglang_triton,
    "sglang csgmv": sglang_csgmv,
    "torch bmm": torch_bmm,
    "flashinfer": flashinfer_segment_gemm,
}
