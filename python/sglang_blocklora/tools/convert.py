"""Makes a block-diagonal adapter of any LoRA adapter, by a truncated SVD of each block of its delta.

Block i of a column-parallel delta is its rows [i out/n, (i + 1) out/n); of a row-parallel delta, its columns
[i in/n, (i + 1) in/n). Each block has its own A and B of rank r'/n, so the best r'/n singular values of the block are
what can be kept (Eckart-Young), and nothing is lost where r'/n reaches the old rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.adapters.tensor_names import PEFT_PREFIX
from sglang_blocklora.sharding.architectures import kind_of, suffix_of
from sglang_blocklora.sharding.cut import block_diagonal
from sglang_blocklora.sharding.vocabulary import EMBEDDING
from sglang_blocklora.tools.opened import OpenedAdapter, open_adapter


class TooLossy(ValueError):
    """The conversion would lose more than was allowed; nothing was written."""


@dataclass(frozen=True)
class ModuleLoss:
    """Frobenius norm of what a module's delta lost, relative to the delta's own."""

    module: str
    rank: int
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion made, and what it lost; errors are relative to the deltas of ``source``."""

    path: str
    rank: int
    nblocks: int
    parameters_before: int
    parameters: int
    max_relative_error: float
    modules: list[ModuleLoss]


def convert(source: Path, target: Path, nblocks: int, rank: int | None, max_error: float) -> Conversion:
    """Write a block-diagonal copy of ``source`` to the new folder ``target``.

    rank       full rank of the copy, a multiple of ``nblocks``; None: nblocks times the old rank, which loses nothing
    max_error  largest relative error that a module may have
    Raises ``AdapterError`` (source cannot be served), ``TooLossy`` and ``ValueError``; nothing is written then.
    """
    if target.exists():
        raise ValueError(f"{target} exists; give a new folder")
    with open_adapter(source) as adapter:
        largest = nblocks * max(module.shape.rank for module in adapter.modules.values())
        rank = largest if rank is None else min(rank, largest)
        _check_sizes(adapter, nblocks, rank)
        tensors: dict[str, torch.Tensor] = {}
        losses = []
        for module, old in adapter.modules.items():
            own_rank = min(rank, nblocks * old.shape.rank)
            a, b, error = _convert_module(adapter, module, nblocks, own_rank)
            losses.append(ModuleLoss(module, own_rank, error))
            tensors[f"{PEFT_PREFIX}{old.name}.lora_A.weight"] = a
            tensors[f"{PEFT_PREFIX}{old.name}.lora_B.weight"] = b
        worst = max(losses, key=lambda loss: loss.relative_error)
        if worst.relative_error > max_error:
            raise TooLossy(
                f"rank {rank} with nblocks {nblocks} loses {worst.relative_error:.3g} of the delta of {worst.module} "
                f"(relative Frobenius norm); allowed is {max_error:.3g}. Nothing was written. Rank {largest} loses "
                "nothing; or allow the loss with --max-error and measure the adapter's quality. A block-diagonal "
                "adapter that was trained as one is better than a converted one."
            )
        before = adapter.parameters
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS_NAME)
    config = _config(source, nblocks, rank, losses)
    (target / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    after = sum(tensor.numel() for tensor in tensors.values())
    return Conversion(
        path=str(target),
        rank=rank,
        nblocks=nblocks,
        parameters_before=before,
        parameters=after,
        max_relative_error=worst.relative_error,
        modules=losses,
    )


def _check_sizes(adapter: OpenedAdapter, nblocks: int, rank: int) -> None:
    if rank < nblocks or rank % nblocks:
        raise ValueError(f"rank {rank} is no multiple of nblocks {nblocks}")
    for module, (inputs, outputs) in adapter.features.items():
        if suffix_of(module) == EMBEDDING:
            raise ValueError(
                f"{module}: embeddings have no block-diagonal form; train without them, or serve it as it is"
            )
        axis, size = ("in", inputs) if kind_of(module) == "row" else ("out", outputs)
        if size % nblocks:
            raise ValueError(f"{module}: {axis}_features {size} is no multiple of nblocks {nblocks}; choose another n.")


def _convert_module(
    adapter: OpenedAdapter, module: str, nblocks: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Packed A and B in float32 with the old scaling folded in, and the relative error of what was stored."""
    a, b = adapter.dense_factors(module)
    b = b * adapter.modules[module].scaling
    row = kind_of(module) == "row"
    parts = [(one, b) for one in a.chunk(nblocks, 1)] if row else [(a, one) for one in b.chunk(nblocks, 0)]
    cut = [_truncate(*part, rank // nblocks) for part in parts]
    new_a = torch.cat([one[0] for one in cut]).float()
    new_b = torch.cat([one[1] for one in cut], dim=1 if row else 0).float()
    if row:
        dense_a, dense_b = block_diagonal(new_a, nblocks).double(), new_b.double()
    else:
        dense_a, dense_b = new_a.double(), block_diagonal(new_b, nblocks).double()
    norm = _norm(a, b)
    lost = _norm(torch.cat([a, dense_a]), torch.cat([b, -dense_b], dim=1))
    return new_a.contiguous(), new_b.contiguous(), lost / norm if norm else 0.0


def _truncate(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A' [rank, in] and B' [out, rank] whose product is the best approximation of B @ A; zeros beyond its rank."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t())
    keep = min(rank, len(s))
    root = s[:keep].sqrt()
    new_a, new_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(b.shape[0], rank)
    new_a[:keep] = root[:, None] * (vh[:keep] @ q_a.t())
    new_b[:, :keep] = (q_b @ u[:, :keep]) * root
    return new_a, new_b


def _norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of B @ A, without making the product."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.t())[1].t()))


def _config(source: Path, nblocks: int, rank: int, losses: list[ModuleLoss]) -> Mapping[str, Any]:
    """The source's config with the new structure; alpha equals the rank, since the scaling is in the weights."""
    raw = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    suffixes = sorted({suffix_of(loss.module) for loss in losses})
    own = {loss.module: loss.rank for loss in losses if loss.rank != rank}
    changes: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "use_rslora": False,
        "init_lora_weights": True,
        "use_bdlora": {
            "target_modules_bd_a": [suffix for suffix in suffixes if kind_of(suffix) == "row"],
            "target_modules_bd_b": [suffix for suffix in suffixes if kind_of(suffix) == "column"],
            "nblocks": nblocks,
            "match_strict": True,
        },
    }
    return {**raw, **changes}
