"""Launches shrink and expand for one linear of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from blocklora_kernels import tiles
from blocklora_kernels.batch import BatchMetadata
from blocklora_kernels.checks import check_activations, check_linear
from blocklora_kernels.descriptor import HEAD_FIELDS, MAX_SLICES, SLICE_FIELDS
from blocklora_kernels.expand_kernel import expand_kernel
from blocklora_kernels.experts import ExpertBatch
from blocklora_kernels.launcher import Launcher
from blocklora_kernels.look_up_kernel import look_up_kernel
from blocklora_kernels.shrink_kernel import shrink_kernel

GRANULE = 8  # elements that one vector load takes: 16 bytes of a 16-bit type
VECTOR_BYTES = 16
# Columns, ranks and outputs at a time where nothing is aligned: an address for each element costs registers.
NARROW = 16
NARROW_OUTPUTS = 32
NARROW_WARPS = 4  # at least


Batch = BatchMetadata | ExpertBatch


class ExpertDescriptors(NamedTuple):
    """How many experts a linear is of, and how many elements their descriptors (and scalings) lie apart."""

    number: int
    stride: int


NO_EXPERTS = ExpertDescriptors(1, 0)


class LoraLinear:
    """Computes the LoRA delta of one (possibly fused) linear for mixed batches, reading weights in the arena.

    Or of all experts of a layer at once, for an ``ExpertBatch``: descriptors and scalings are then those of expert 0.

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
        experts: ExpertDescriptors = NO_EXPERTS,
        choices: int = 1,
    ) -> None:
        """
        planes       K and V rows of this layer, each [arena slots, W], W a multiple of 8, unit stride along W
        slots        int32 [adapters, max_slots]; first_slots int32 [adapters]: see ``AdapterTable``
        descriptors  int32 [adapters, DESCRIPTOR_FIELDS] of this linear; scalings float32 [adapters, MAX_SLICES]
        in_features  local input width
        out_offsets  [slices + 1], where each slice's output columns start and end on this TP rank; starts at 0
        dependent    launch expand while shrink ends, on the same stream (sm_90 and later)
        debug        check every address of the batch's adapters before each launch (synchronises with the device)
        experts      of more than one, where the others' descriptors are
        choices      rows of the batch that share a row of x: the router's choices for one token
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
        self.experts, self.choices = experts, choices
        self.width = planes[0].shape[1]
        self.row_stride = planes[0].stride(0)
        lengths = (self.row_stride, in_features, *out_offsets)
        aligned = all(n % GRANULE == 0 for n in lengths) and all(p.data_ptr() % VECTOR_BYTES == 0 for p in planes)
        self.vector = GRANULE if aligned else 1
        self._shrink, self._expand = Launcher(shrink_kernel), Launcher(expand_kernel)

    def shrink(self, x: torch.Tensor, batch: Batch) -> None:
        """Partial sums of h for the batch's adapted tokens into ``batch.h``; ``x`` [batch_tokens, in_features]."""
        check_activations("x", x, self.in_features, self.planes[0].dtype, batch.batch_tokens // self.choices)
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
            *self.experts,
            self.choices,
        )
        constants = {
            "WIDTH": self.width,
            "VECTOR": self.vector,
            "BLOCK_T": batch.tiling.block_tokens,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k if self.vector > 1 else NARROW,
            "DEPENDENT": self.dependent,
            "EXPERTS": self.experts.number > 1,
        }
        self._shrink.launch(
            (batch.tiling.block_tokens, tile, x.stride(0), x.data_ptr() % VECTOR_BYTES),
            min(tile.programs * batch.processors, batch.grid_tiles * lanes * batch.tiling.most_splits),
            arguments,
            constants,
            num_warps=tile.warps if self.vector > 1 else max(tile.warps, NARROW_WARPS),
            num_stages=tile.stages,
        )

    def expand_(
        self, out: torch.Tensor, batch: Batch, weights: torch.Tensor | None = None, most_splits: int | None = None
    ) -> None:
        """After ``shrink``: add ``scaling * h B^T`` of every slice to ``out`` [batch_tokens, outputs], in place.

        weights      float32 [batch_tokens], what each row's delta is multiplied with; None: 1
        most_splits  parts in which h lies at most; None: as shrink has written it
        """
        check_activations("out", out, self.out_offsets[-1], self.planes[0].dtype, batch.batch_tokens)
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
            self.scalings if weights is None else weights,
            out.stride(0),
            batch.h_stride,
            self.row_stride,
            batch.capacity,
            self.slots.stride(0),
            self.descriptors.stride(0),
            self.scalings.stride(0),
            *self.out_ends,
            *self._shares(batch, shrink_tile)[:2],
            most_splits or self._shares(batch, shrink_tile)[2],
            *self.experts,
        )
        constants = {
            "WIDTH": self.width,
            "VECTOR": self.vector,
            "BLOCK_T": batch.tiling.block_tokens,
            "BLOCK_N": shrink_tile.block_n,
            "BLOCK_O": block_o,
            "BLOCK_R": tile.block_r if self.vector > 1 else NARROW,
            "DEPENDENT": self.dependent,
            "EXPERTS": self.experts.number > 1,
            "WEIGHTED": weights is not None,
        }
        self._expand.launch(
            (
                weights is None,
                batch.tiling.block_tokens,
                shrink_tile,
                tile,
                out.stride(0),
                out.data_ptr() % VECTOR_BYTES,
            ),
            min(tile.programs * batch.processors, batch.grid_tiles * chunks),
            arguments,
            constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **{"launch_pdl": True} if self.dependent else {},
        )

    def _shrink_tile(self, batch: Batch) -> tiles.ShrinkTile:
        return tiles.shrink_tile(batch.arch, batch.tiling.block_tokens, batch.rank_class, self.in_features)

    def _shares(self, batch: Batch, tile: tiles.ShrinkTile) -> tuple[int, int, int]:
        """``slices``, ``shares`` and ``most_splits`` of both kernels (``division.py``)."""
        steps = -(-self.in_features // tile.block_k)
        return self.slices, tile.programs * batch.processors, min(batch.tiling.most_splits, steps)

    def add_delta_(self, out: torch.Tensor, x: torch.Tensor, batch: Batch, weights: torch.Tensor | None = None) -> None:
        """Shrink and expand on the current stream."""
        self.shrink(x, batch)
        self.expand_(out, batch, weights)

    def check_addresses(self, batch: Batch) -> None:
        """``ValueError`` where a matrix of one of the batch's adapters leaves its slots, or a slot the arena."""
        if not isinstance(batch, BatchMetadata):
            raise ValueError("debug: addresses of experts are not checked, whose adapters only the device knows")
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


class LoraEmbedding:
    """Computes the LoRA delta of embeddings, whose A lies in parts: ids of one part after another.

    parts  each part's linear, its input the ids of the part, and the first of them; B is the same in all
    """

    def __init__(self, parts: Sequence[tuple[LoraLinear, int]]) -> None:
        self._parts = tuple(parts)
        self._launchers = [Launcher(look_up_kernel) for _ in parts]

    def add_delta_(self, out: torch.Tensor, ids: torch.Tensor, batch: BatchMetadata) -> None:
        """Add ``scaling * A[:, id] B^T`` to ``out`` [batch_tokens, hidden] for ids that a part has; int [tokens]."""
        if not batch.grid_tiles:
            return
        batch.h[: batch.batch_tokens * batch.h_stride].zero_()
        for (linear, first_id), launcher in zip(self._parts, self._launchers, strict=True):
            arguments = (
                ids,
                batch.h,
                *linear.planes,
                batch.tiles,
                batch.tokens,
                linear.slots,
                linear.first_slots,
                linear.descriptors,
                batch.h_stride,
                linear.row_stride,
                batch.capacity,
                linear.slots.stride(0),
                linear.descriptors.stride(0),
                linear.in_features,
                first_id,
            )
            constants = {"WIDTH": linear.width, "BLOCK_T": batch.tiling.block_tokens, "BLOCK_N": NARROW}
            grid = min(batch.processors, batch.grid_tiles)
            variant = (batch.tiling.block_tokens, ids.dtype, ids.data_ptr() % VECTOR_BYTES)
            launcher.launch(variant, grid, arguments, constants, num_warps=NARROW_WARPS, num_stages=1)
        self._parts[0][0].expand_(out, batch, most_splits=1)
