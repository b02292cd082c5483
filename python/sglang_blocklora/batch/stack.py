"""The factors of all adapters of a batch side by side, for as long as batches have the same adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from blocklora_kernels.reference import LinearFactors
from blocklora_kernels.stacked import StackedFactors, add_deltas_, foreign, stack, stacked_bytes

from sglang_blocklora.memory.loaded import Resident

# [layer][linear], None where the adapter leaves the linear alone.
AdapterFactors = tuple[tuple[LinearFactors | None, ...], ...]


def stack_bytes(factors: AdapterFactors) -> int:
    """Bytes that one adapter takes in a ``Stack``."""
    return sum(stacked_bytes(linear) for layer in factors for linear in layer if linear is not None)


@dataclass(frozen=True)
class Stack:
    """Copies of adapters' factors for all linears.

    adapters  each adapter and its number in the stack
    layers    [layer][linear]: the factors and the place of their owners in ``owners``; None where nothing is adapted
    owners    the different lists of owners that linears have
    """

    adapters: Mapping[str, tuple[int, Resident]]
    layers: tuple[tuple[tuple[StackedFactors, int] | None, ...], ...]
    owners: tuple[torch.Tensor, ...]

    @staticmethod
    def of(adapters: Mapping[str, Resident], factors: Sequence[AdapterFactors]) -> Stack:
        """Copy ``factors`` of ``adapters``, in the same order."""
        owners: dict[tuple[int, ...], int] = {}
        layers = []
        for layer in zip(*factors, strict=True):
            linears: list[tuple[StackedFactors, int] | None] = []
            for linear in zip(*layer, strict=True):
                stacked = stack(linear)
                if stacked is None:
                    linears.append(None)
                else:
                    linears.append((stacked, owners.setdefault(tuple(stacked.owners.tolist()), len(owners))))
            layers.append(tuple(linears))
        numbered = {key: (number, resident) for number, (key, resident) in enumerate(adapters.items())}
        return Stack(numbered, tuple(layers), tuple(map(torch.tensor, owners)))

    def serves(self, adapters: Mapping[str, Resident]) -> bool:
        """Whether it holds all of ``adapters`` as they are resident now, and not many others beside them."""
        known = (self.adapters.get(key, (0, None))[1] is resident for key, resident in adapters.items())
        return len(self.adapters) <= 2 * len(adapters) and all(known)


class StackedBatch:
    """Adds the deltas of one batch by a ``Stack``."""

    def __init__(self, own: Stack, keys: Sequence[str | None], token_counts: Sequence[int] | None) -> None:
        """``keys`` and ``token_counts`` as in ``DeltaAdder.prepare``; keys that the stack lacks have no delta."""
        known = {key: number for key, (number, _) in own.adapters.items()}
        numbers = torch.tensor([-1 if key is None else known.get(key, -1) for key in keys])
        if token_counts is not None:
            numbers = numbers.repeat_interleave(torch.tensor(token_counts))
        self._layers = own.layers
        self._foreign = [foreign(numbers, owners) for owners in own.owners]

    def add_deltas_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        """As ``DeltaAdder.add_delta_``."""
        known = self._layers[layer][linear]
        if known is not None:
            factors, owners = known
            add_deltas_(out, x, factors, self._foreign[owners])
