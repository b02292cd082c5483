"""Opens an adapter's folder for a tool: config, checked shapes, and its factors as dense matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blocklora.adapters.checkpoint import Checkpoint
from sglang_blocklora.adapters.config import AdapterConfig, read_config
from sglang_blocklora.adapters.tokenizer_files import check_tokens
from sglang_blocklora.adapters.validate import AdaptedModule, check_modules
from sglang_blocklora.sharding.cut import block_diagonal
from sglang_blocklora.sharding.linears import ModelSpec
from sglang_blocklora.tools.base_model import BaseSizes, KnownSizes

NO_RANK_LIMIT = 2**31


@dataclass(frozen=True, kw_only=True)
class OpenedAdapter:
    """An adapter's folder while it is open.

    base      the base model's sizes where they were given; sizes: those, or what the adapter tells of them
    features  path of an adapted module -> (in, out) of its base layer
    modules   path of an adapted module -> what the weights hold for it, checked against the stored tensors
    """

    name: str
    folder: Path
    config: AdapterConfig
    checkpoint: Checkpoint
    base: BaseSizes | None
    sizes: BaseSizes | KnownSizes
    features: Mapping[str, tuple[int, int]]
    modules: Mapping[str, AdaptedModule]

    def spec(self, tp_rank: int, tp_size: int, dtype: torch.dtype) -> ModelSpec:
        """The base model's linears as one TP rank holds them."""
        return self.sizes.spec(dtype, tp_rank, tp_size)

    def dense_factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] in float64 with packed factors made dense: PEFT's delta is scaling * B @ A."""
        name, shape = self.modules[module].name, self.modules[module].shape
        a, b = (self.checkpoint.read(name, factor, None, None).double() for factor in ("A", "B"))
        if shape.structure == "block_a":
            a = block_diagonal(a, shape.nblocks)
        elif shape.structure == "block_b":
            b = block_diagonal(b, shape.nblocks)
        return a, b

    def parameters_of(self, module: str) -> int:
        """Trained numbers of a module: elements of both stored factors."""
        return sum(rows * columns for rows, columns in self.modules[module].shape.stored_shapes(*self.features[module]))

    @property
    def parameters(self) -> int:
        return sum(map(self.parameters_of, self.modules))


@contextmanager
def open_adapter(folder: Path, base: BaseSizes | None = None) -> Iterator[OpenedAdapter]:
    """Open and check the adapter in ``folder``. Raises ``AdapterError`` for what a server would refuse too."""
    name = folder.resolve().name
    config = read_config(name, folder)
    with Checkpoint(name, folder, config) as checkpoint:
        sizes = base or KnownSizes.of(name, config, checkpoint.shapes)
        spec = sizes.spec(torch.bfloat16, 0, 1)
        modules = check_modules(name, config, checkpoint.shapes, spec, NO_RANK_LIMIT)
        if base:
            check_tokens(name, folder, base.vocab)
        yield OpenedAdapter(
            name=name,
            folder=folder,
            config=config,
            checkpoint=checkpoint,
            base=base,
            sizes=sizes,
            features={
                path: (linear.inputs.size, linear.sources[path].size)
                for layer in spec.layers
                for linear in layer
                for path in linear.sources
                if path in modules
            },
            modules=modules,
        )
