"""Tells what an adapter is, and what it costs on each TP rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.adapters.notes import notes
from sglang_blocklora.adapters.tokenizer_files import TOKEN_FILES, TOKENIZER
from sglang_blocklora.sharding.architectures import kind_of, suffix_of
from sglang_blocklora.sharding.cut import ModuleShape
from sglang_blocklora.sharding.layout import place
from sglang_blocklora.sharding.plan import plan_linear
from sglang_blocklora.tools.base_model import BaseSizes, KnownSizes
from sglang_blocklora.tools.opened import OpenedAdapter, open_adapter


@dataclass(frozen=True, kw_only=True)
class ModuleGroup:
    """Modules of one name that are alike, over all layers."""

    module: str
    count: int
    kind: str
    structure: str
    orientation: str
    rank: int
    nblocks: int
    in_features: int
    out_features: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class TpCost:
    """Bytes of the weights that each TP rank stores.

    slots, arena_bytes  rows of the arena and the bytes they take, padding included; None without the base model
    """

    tp_size: int
    bytes_per_rank: list[int]
    slots: int | None
    arena_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What ``inspect`` tells; ``rank`` and ``nblocks`` are the largest among the modules.

    invocation       token ids from which on an activated adapter is active; empty for others
    invocation_text  the same as text, where the base model's tokenizer is there
    """

    path: str
    content_hash: str
    rank: int
    nblocks: int
    use_rslora: bool
    invocation: list[int]
    invocation_text: str | None
    layers: int
    parameters: int
    dtype: str
    modules: list[ModuleGroup]
    tp: list[TpCost]
    warnings: list[str] = field(default_factory=list)


def inspect_adapter(
    folder: Path,
    base: BaseSizes | None,
    tp_sizes: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    base_folder: Path | None = None,
) -> Inspection:
    """Describe the adapter in ``folder``, served in ``dtype``. Raises ``AdapterError``.

    base_folder  the base model's, for its tokenizer
    """
    with open_adapter(folder, base) as adapter:
        groups = _groups(adapter)
        spec = adapter.spec(0, 1, dtype)
        shapes = {path: module.shape for path, module in adapter.modules.items()}
        costs = [_cost(adapter, shapes, size, dtype) for size in tp_sizes]
        return Inspection(
            path=str(folder),
            content_hash=content_hash(folder),
            rank=max(group.rank for group in groups),
            nblocks=max(group.nblocks for group in groups),
            use_rslora=adapter.config.use_rslora,
            invocation=list(adapter.config.invocation),
            invocation_text=_text(adapter.config.invocation, base_folder),
            layers=len({spec.find()[path][0] for path in adapter.modules}),
            parameters=adapter.parameters,
            dtype=str(dtype).removeprefix("torch."),
            modules=groups,
            tp=costs,
            warnings=list(_warnings(adapter, groups, tp_sizes)),
        )


def _text(tokens: Sequence[int], base_folder: Path | None) -> str | None:
    """What the base model's tokenizer makes of ``tokens``; None without tokens or a fast tokenizer's file."""
    file = base_folder / TOKENIZER if base_folder is not None else None
    if not tokens or file is None or not file.is_file():
        return None
    text: str = Tokenizer.from_file(str(file)).decode(list(tokens), skip_special_tokens=False)
    return text


def _groups(adapter: OpenedAdapter) -> list[ModuleGroup]:
    alike: dict[tuple[Any, ...], list[str]] = {}
    for path, module in adapter.modules.items():
        alike.setdefault((suffix_of(path), module.shape, adapter.features[path]), []).append(path)
    groups = []
    for (suffix, shape, (in_features, out_features)), modules in alike.items():
        kind = kind_of(suffix)
        if shape.structure == "plain" or shape.nblocks == 1:
            orientation = "plain"
        else:
            orientation = "wrong" if shape.made_dense(kind) else "right"
        parameters = sum(map(adapter.parameters_of, modules))
        groups.append(
            ModuleGroup(
                module=suffix,
                count=len(modules),
                kind=kind,
                structure=shape.structure,
                orientation=orientation,
                rank=shape.rank,
                nblocks=shape.nblocks,
                in_features=in_features,
                out_features=out_features,
                parameters=parameters,
            )
        )
    return groups


def cost_per_rank(
    sizes: BaseSizes | KnownSizes, shapes: Mapping[str, ModuleShape], tp_size: int, dtype: torch.dtype
) -> tuple[list[int], int, int]:
    """Bytes of an adapter's weights on each TP rank, the slots they take, and bytes of those.

    sizes   of the base model; what an adapter alone tells of them gives no slots that a server would need
    shapes  path of an adapted module -> what the weights hold for it
    """
    weights, slots = [], 0
    for rank in range(tp_size):
        spec = sizes.spec(dtype, rank, tp_size)
        elements = 0
        for layer in spec.layers:
            counts = [count for linear in layer for count in plan_linear(linear, shapes, spec).sizes()]
            elements += sum(counts)
            slots = max(slots, place(counts, spec.row_width).rows)
        weights.append(elements * dtype.itemsize)
    return weights, slots, len(spec.layers) * 2 * slots * spec.row_width * dtype.itemsize


def _cost(adapter: OpenedAdapter, shapes: Mapping[str, ModuleShape], tp_size: int, dtype: torch.dtype) -> TpCost:
    weights, slots, arena_bytes = cost_per_rank(adapter.sizes, shapes, tp_size, dtype)
    known = adapter.base is not None
    return TpCost(
        tp_size=tp_size,
        bytes_per_rank=weights,
        slots=slots if known else None,
        arena_bytes=arena_bytes if known else None,
    )


def _warnings(adapter: OpenedAdapter, groups: Iterable[ModuleGroup], tp_sizes: Sequence[int]) -> Iterable[str]:
    """What a load would tell, and what depends on TP sizes or is not known without the base model."""
    yield from notes(adapter.name, adapter.folder, adapter.config, adapter.modules, adapter.spec(0, 1, torch.float32))
    plain = sorted({group.module for group in groups if group.orientation == "plain"})
    if plain and adapter.config.nblocks > 1:
        yield f"{', '.join(plain)}: plain in a block-diagonal adapter; every TP rank holds one of its factors whole."
    n = adapter.config.nblocks
    cut = [size for size in tp_sizes if n > 1 and n % size and size % n]
    if cut:
        yield f"nblocks {n} and TP {', '.join(map(str, cut))}: neither divides the other, so ranks share blocks."
    if adapter.base is None:
        if any(group.module in ("k_proj", "v_proj", "qkv_proj") for group in groups):
            yield "KV heads unknown: with more TP ranks than KV heads the bytes of K and V are higher (--base-model)."
        files = [name for name in TOKEN_FILES if (adapter.folder / name).exists()]
        if files:
            yield f"not checked without --base-model: {', '.join(files)}; tokens beyond its vocabulary are refused."
