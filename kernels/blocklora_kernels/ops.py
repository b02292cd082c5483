"""Launches shrink and expand for one linear of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from blocklora_kernels import tiles
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.checks import check_activations, check_linear
from blocklora_kernels.descriptor import HEAD_FIELDS, MAX_SLICES, SLICE_FIELDS
from blocklora_kernels.expand_kernel import expand_kernel
from blocklora_kernels.launcher import Launcher
from blocklora_kernels.shrink_kernel import shrink_kernel

GRANULE = 8  # elements that one vector load takes: 16 bytes of a 16-bit type
VECTOR_BYTES = 16
# Columns, ranks and outputs at a time where nothing is aligned: an address for each element costs registers.
NARROW = 16
NARROW_OUTPUTS = 32
NARROW_WARPS = 4  # at least


class LoraLinear:
    """Computes the LoRA delta of one (possibly fused) linear for mixed batches, reading weights in the arena.

    Holds references only; the tensors belong to the caller and keep their addresses while CUDA graphs exist.
    """

    def __init__(
        self,
        planes: Sequence[torch.Tensor],
        slots: torch.Tensor,
        first_slots: torch.Tensor,
        descriptors: torch.Tensor,
        scalings: torch.Tensor,
        in_features: int,
        out_offsets: Sequence[int],
        dependent: bool = False,
        debug: bool = False,
    ) -> None:
        """
        planes       K and V rows of this layer, each [arena slots, W], W a multiple of 8, unit stride along W
        slots        int32 [adapters, max_slots]; first_slots int32 [adapters]: see ``AdapterTable``
        descriptors  int32 [adapters, DESCRIPTOR_FIELDS] of this linear; scalings float32 [adapters, MAX_SLICES]
        in_features  local input width
        out_offsets  [slices + 1], where each slice's output columns start and end on this TP rank; starts at 0
        dependent    launch expand while shrink ends, on the same stream (sm_90 and later)
        debug        check every address of the batch's adapters before each launch (synchronises with the device)
        """
        check_linear(planes, slots, first_slots, descriptors, scalings, in_features, out_offsets)
        self.planes = tuple(planes)
        self.slots, self.first_slots = slots, first_slots
        self.descriptors, self.scalings = descriptors, scalings
        self.in_features = in_features
        self.out_offsets = tuple(out_offsets)
        self.out_ends = self.out_offsets[1:] + (out_offsets[-1],) * (MAX_SLICES + 1 - len(out_offsets))
        self.slices = len(out_offsets) - 1
        self.dependent = dependent
        self.debug = debug
        self.width = planes[0].shape[1]
        self.row_stride = planes[0].stride(0)
        lengths = (self.row_stride, in_features, *out_offsets)
        aligned = all(n % GRANULE == 0 for n in lengths) and all(p.data_ptr() % VECTOR_BYTES == 0 for p in planes)
        self.vector = GRANULE if aligned else 1
        self._shrink, self._expand = Launcher(shrink_kernel), Launcher(expand_kernel)

    def shrink(self, x: torch.Tensor, batch: BatchMetadata) -> None:
        """Partial sums of h for the batch's adapted tokens into ``batch.h``; ``x`` [batch_tokens, in_features]."""
        check_activations("x", x, self.in_features, self.planes[0].dtype, batch)
        if self.debug:
            self.check_addresses(batch)
        if not batch.grid_tiles:
            return
        if x.stride(0) % self.vector or x.data_ptr() % (VECTOR_BYTES if self.vector > 1 else 1):
            x = x.clone(memory_format=torch.contiguous_format)
        tile = self._shrink_tile(batch)
        lanes = -(-batch.rank * self.slices // tile.block_n)
        arguments = (
            x,
            batch.h,
            *self.planes,
            batch.tiles,
            batch.tokens,
            self.slots,
            self.first_slots,
            self.descriptors,
            x.stride(0),
            batch.h_stride,
            self.row_stride,
            batch.capacity,
            self.slots.stride(0),
            self.descriptors.stride(0),
            self.in_features,
            *self._shares(batch, tile),
        )
        constants = {
            "WIDTH": self.width,
            "VECTOR": self.vector,
            "BLOCK_T": batch.tiling.block_tokens,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k if self.vector > 1 else NARROW,
            "DEPENDENT": self.dependent,
        }
        self._shrink.launch(
            (batch.tiling.block_tokens, tile, x.stride(0), x.data_ptr() % VECTOR_BYTES),
            min(tile.programs * batch.processors, batch.grid_tiles * lanes * batch.tiling.most_splits),
            arguments,
            constants,
            num_warps=tile.warps if self.vector > 1 else max(tile.warps, NARROW_WARPS),
            num_stages=tile.stages,
        )

    def expand_(self, out: torch.Tensor, batch: BatchMetadata) -> None:
        """After ``shrink``: add ``scaling * h B^T`` of every slice to ``out`` [batch_tokens, outputs], in place."""
        check_activations("out", out, self.out_offsets[-1], self.planes[0].dtype, batch)
        if self.debug:
            self.check_addresses(batch)
        if not batch.grid_tiles:
            return
        shrink_tile = self._shrink_tile(batch)
        tile = tiles.expand_tile(batch.arch, batch.tiling.block_tokens, batch.rank_class, self.out_offsets[-1])
        block_o = tile.block_o if self.vector > 1 else NARROW_OUTPUTS
        chunks = sum(-(-(end - start) // block_o) for start, end in pairwise(self.out_offsets))
        arguments = (
            out,
            batch.h,
            *self.planes,
            batch.tiles,
            batch.tokens,
            self.slots,
            self.first_slots,
            self.descriptors,
            self.scalings,
            out.stride(0),
            batch.h_stride,
            self.row_stride,
            batch.capacity,
            self.slots.stride(0),
            self.descriptors.stride(0),
            self.scalings.stride(0),
            *self.out_ends,
            *self._shares(batch, shrink_tile),
        )
        constants = {
            "WIDTH": self.width,
            "VECTOR": self.vector,
            "BLOCK_T": batch.tiling.block_tokens,
            "BLOCK_N": shrink_tile.block_n,
            "BLOCK_O": block_o,
            "BLOCK_R": tile.block_r if self.vector > 1 else NARROW,
            "DEPENDENT": self.dependent,
        }
        self._expand.launch(
            (batch.tiling.block_tokens, shrink_tile, tile, out.stride(0), out.data_ptr() % VECTOR_BYTES),
            min(tile.programs * batch.processors, batch.grid_tiles * chunks),
            arguments,
            constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **{"launch_pdl": True} if self.dependent else {},
        )

    def _shrink_tile(self, batch: BatchMetadata) -> tiles.ShrinkTile:
        return tiles.shrink_tile(batch.arch, batch.tiling.block_tokens, batch.rank_class, self.in_features)

    def _shares(self, batch: BatchMetadata, tile: tiles.ShrinkTile) -> tuple[int, int, int]:
        """``slices``, ``shares`` and ``most_splits`` of both kernels (``division.py``)."""
        steps = -(-self.in_features // tile.block_k)
        return self.slices, tile.programs * batch.processors, min(batch.tiling.most_splits, steps)

    def add_delta_(self, out: torch.Tensor, x: torch.Tensor, batch: BatchMetadata) -> None:
        """Shrink and expand on the current stream."""
        self.shrink(x, batch)
        self.expand_(out, batch)

    def check_addresses(self, batch: BatchMetadata) -> None:
        """``ValueError`` where a matrix of one of the batch's adapters leaves its slots, or a slot the arena."""
        arena_slots = self.planes[0].shape[0]
        slots, first_slots, descriptors = self.slots.cpu(), self.first_slots.cpu(), self.descriptors.cpu()
        for adapter in batch.adapters.tolist():
            if not 0 <= adapter < len(slots):
                raise ValueError(f"segments: adapter {adapter}, expected 0 to {len(slots) - 1}")
            d = descriptors[adapter].tolist()
            if d[0] > batch.h_width:
                raise ValueError(f"descriptors[{adapter}]: h_width {d[0]}, expected at most {batch.h_width} (batch.h)")
            sizes = [(d[3], d[4], d[1] * self.in_features)] if d[0] else []
            for i, (first, end) in enumerate(pairwise(self.out_offsets)):
                s = d[HEAD_FIELDS + i * SLICE_FIELDS :]
                sizes += [(s[3], s[4], (end - first) * s[5])] if s[0] else []
            for row, column, size in sizes:
                stop = row + -(-(column + size) // self.width)
                if row < 0 or stop > slots.shape[1]:
                    raise ValueError(
                        f"descriptors[{adapter}]: rows {row} to {stop}, expected within the {slots.shape[1]} of slots"
                    )
                first_slot = int(first_slots[adapter])
                used = slots[adapter, row:stop] if first_slot < 0 else torch.arange(row, stop) + first_slot
                if len(used) and not 0 <= int(used.min()) <= int(used.max()) < arena_slots:
                    raise ValueError(
                        f"slots[{adapter}]: {int(used.min())} to {int(used.max())}, expected 0 to {arena_slots - 1}"
                    )
