"""What is compared: each method is a function of one copy's index that adds the delta of the whole batch to ``out``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from blocklora_kernels.batch import cut_into_tiles
from problem import Problem

Run = Callable[[int], object]
MOST_GATHERED_BYTES = 8 << 30


def ours(p: Problem) -> Run:
    return lambda copy: p.ours[copy].add_delta_(p.out, p.x, p.batch)


def _upstream(module: str) -> ModuleType:
    """A module of SGLang's LoRA kernels, which 0.5.22 has moved."""
    folder = "lora.dense" if importlib.util.find_spec("sglang.kernels.ops.lora") else "gemm"
    return importlib.import_module(f"sglang.kernels.ops.{folder}.{module}")


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
    gate_up_lora_b_fwd = _upstream("gate_up_lora_b").gate_up_lora_b_fwd
    qkv_lora_b_fwd = _upstream("qkv_lora_b").qkv_lora_b_fwd
    sgemm_lora_a_fwd = _upstream("sgemm_lora_a").sgemm_lora_a_fwd
    sgemm_lora_b_fwd = _upstream("sgemm_lora_b").sgemm_lora_b_fwd
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
    expand = _upstream("chunked_sgmv_expand").chunked_sgmv_lora_expand_forward
    shrink = _upstream("chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward
    chunk = 128 if len(p.x) >= 256 else 32 if len(p.x) >= 64 else 16
    info = _batch_info(p, chunk)
    info.max_len = chunk
    offsets = torch.tensor(p.out_offsets, dtype=torch.int32, device="cuda")
    slices = len(p.linear.outputs)

    def run(copy: int) -> object:
        h = shrink(p.x, p.a[copy], info, slices)
        return expand(h, p.b[copy], info, offsets, max(p.linear.outputs), p.out)

    return run


def sglang_triton_v2(p: Problem) -> Run | None:
    """The ``triton_v2`` backend's kernels and plan. Routes are built before the graph: once a pass for all layers."""
    if importlib.util.find_spec("sglang.srt.lora.dense") is None:  # 0.5.21
        return None
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    adapters, tokens = p.a.shape[1], len(p.x)
    slots = np.full(tokens, -1, np.int32)
    slots[p.segments.tokens] = np.repeat(p.segments.adapters, np.diff(p.segments.starts))
    runner = DenseLoraRunner(LoraWorkspace(), max_loras=adapters, device=p.x.device)
    runner.begin_batch(
        token_slots=torch.from_numpy(slots).cuda(),
        lora_ranks=torch.full((adapters,), p.rank, dtype=torch.int32, device="cuda"),
        scalings=torch.ones(adapters, device="cuda"),
        num_tokens=tokens,
        phase=Phase.DECODE if tokens <= 256 else Phase.PREFILL,
        graph_mode=True,
    )
    width = p.out_offsets[-1]
    plan = runner.plan_for(DenseLoraKind.LINEAR, p.rank, p.linear.in_features, width, num_tokens=tokens)
    runner.route(plan.block_size)

    def run(copy: int) -> object:
        h = runner.run_a(p.x, p.a[copy], stack=len(p.linear.outputs), plan=plan)
        return runner.run_b(h, p.b[copy], p.out, offsets=p.out_offsets, plan=plan)

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
    "sglang triton_v2": sglang_triton_v2,
    "torch bmm": torch_bmm,
    "flashinfer": flashinfer_segment_gemm,
}
