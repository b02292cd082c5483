"""One measured problem: the same random adapters as arena rows (ours) and as dense tensors (the others)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.descriptor import Address, Blocks, LinearDescriptor, SliceDescriptor
from blocklora_kernels.ops import LoraLinear
from blocklora_kernels.segments import Segments
from blocklora_kernels.table import AdapterTable, pack_entry
from shapes import Linear

L2_BYTES = 60 << 20  # at least the L2 of an H100 or H200
MAX_COPIES = 128


@dataclass
class Problem:
    """``copies`` sets of weights, so that a run over all of them finds none in L2, as in a model of many layers.

    a, b   [copies, adapters, slices * r, in] and [copies, adapters, outputs, r], the layout of the other kernels
    ours   one ``LoraLinear`` for each copy
    """

    linear: Linear
    rank: int
    x: torch.Tensor
    out: torch.Tensor
    segments: Segments
    batch: BatchMetadata
    a: torch.Tensor
    b: torch.Tensor
    ours: list[LoraLinear]

    @property
    def out_offsets(self) -> tuple[int, ...]:
        return tuple(np.cumsum([0, *self.linear.outputs]).tolist())

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move: weights of the batch's adapters once, adapted rows of x once and of out twice."""
        weights = (self.a[0, 0].numel() + self.b[0, 0].numel()) * len(self.segments.adapters)
        rows = len(self.segments.tokens) * (self.x.shape[1] + 2 * self.out.shape[1])
        return (weights + rows) * self.x.element_size()


def matrices(linear: Linear, rank: int, width: int) -> tuple[LinearDescriptor, int]:
    """Descriptor of local factors laid out as the server does (A in plane 0, B in plane 1), and slots per adapter."""
    slices, position, h_start = [], 0, 0
    for out in linear.outputs:
        address = Address(1, position // width, position % width)
        slices.append(SliceDescriptor(rank, h_start, address, rank, Blocks(1, out, 0)))
        position += -(-out * rank // 8) * 8
        h_start += rank
    blocks = Blocks(1, linear.in_features, 0)
    descriptor = LinearDescriptor(h_start, h_start, Address(0, 0, 0), blocks, tuple(slices))
    elements = max(h_start * linear.in_features, position)
    return descriptor, -(-elements // width)


def build(linear: Linear, rank: int, width: int, per_token: np.ndarray, adapters: int, contiguous: bool) -> Problem:
    """Random bf16 weights of ``adapters`` adapters; ``per_token`` is the adapter of each token."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    descriptor, slots_each = matrices(linear, rank, width)
    weights_bytes = 2 * adapters * rank * (len(linear.outputs) * linear.in_features + sum(linear.outputs))
    copies = min(MAX_COPIES, max(1, -(-2 * L2_BYTES // weights_bytes)))
    rng = np.random.default_rng(0)
    slots = np.arange(adapters * slots_each) if contiguous else rng.permutation(adapters * slots_each)
    table = AdapterTable(1, 1, adapters, slots_each, device)
    entry = pack_entry(np.array(descriptor.pack(), np.int32)[None, None], np.ones((1, 1, 3), np.float32))
    for i in range(adapters):
        own = slots[i * slots_each : (i + 1) * slots_each]
        table.write(i, torch.from_numpy(own).to(device), entry)
    stacked = len(linear.outputs) * rank
    a = torch.randn(copies, adapters, stacked, linear.in_features, device=device, dtype=dtype) / 64
    b = torch.randn(copies, adapters, sum(linear.outputs), rank, device=device, dtype=dtype) / 64
    rows = torch.from_numpy(slots).to(device)
    offsets = tuple(np.cumsum([0, *linear.outputs]).tolist())
    ours = []
    for copy in range(copies):
        planes = [torch.empty(len(slots), width, device=device, dtype=dtype) for _ in range(2)]
        images = [torch.zeros(adapters, slots_each * width, device=device, dtype=dtype) for _ in range(2)]
        images[0][:, : a[0, 0].numel()] = a[copy].flatten(1)
        for s, part in enumerate(descriptor.slices):
            start = part.address.row * width + part.address.column
            block = b[copy][:, offsets[s] : offsets[s + 1]].transpose(1, 2).flatten(1)
            images[1][:, start : start + block.shape[1]] = block
        for plane, image in zip(planes, images, strict=True):
            plane[rows] = image.view(-1, width)
        tables = (table.slots, table.first_slots, table.descriptors[0, 0], table.scalings[0, 0])
        ours.append(LoraLinear(planes, *tables, linear.in_features, offsets))
    tokens = len(per_token)
    batch = BatchMetadata(tokens, adapters, stacked, device)
    segments = Segments.build(per_token)
    batch.update(segments, tokens, rank)
    x = torch.randn(tokens, linear.in_features, device=device, dtype=dtype)
    out = torch.randn(tokens, sum(linear.outputs), device=device, dtype=dtype)
    return Problem(linear, rank, x, out, segments, batch, a, b, ours)
