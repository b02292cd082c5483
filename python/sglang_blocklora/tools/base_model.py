"""The base model's linears as seen from an adapter alone: for tools that run without a server or the base model.

An adapter's config and shapes give every linear's input and output width. What they do not give is how wide a head is
and how many KV heads there are; that comes from the base model's ``config.json`` (``BaseSizes``), where it is at hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sharding.cut import Factor
from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import Interval, LinearSpec, ModelSpec, Source

ROW_MODULES = ("o_proj", "down_proj")
# SGLang's fused column linears and the Hugging Face modules that feed their slices.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MODULE_PATH = re.compile(r".*\blayers\.(?P<layer>\d+)\.(?P<rest>.+)")
# Row width where the base model is unknown: the layout then is an example, its padding is not reported.
ANY_ROW_WIDTH = 1024

Features = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """Sizes of a base model, as its Hugging Face ``config.json`` names them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    @staticmethod
    def read(path: Path) -> BaseSizes:
        """From a model folder or its ``config.json``. ``ValueError`` if it is not there or lacks a size."""
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            heads = raw["num_attention_heads"]
            return BaseSizes(
                hidden=raw["hidden_size"],
                intermediate=raw["intermediate_size"],
                heads=heads,
                kv_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                layers=raw["num_hidden_layers"],
                vocab=raw["vocab_size"],
            )
        except OSError as error:
            raise ValueError(f"base model: cannot read {file} ({error.strerror}); give the model's folder") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"base model: {file} is not the config of a decoder ({error!r})") from error

    def features(self) -> dict[str, tuple[int, int]]:
        """Module suffix -> (in, out) of every linear that an adapter can have."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            "qkv_proj": (self.hidden, q + 2 * kv),
            "gate_up_proj": (self.hidden, 2 * self.intermediate),
        }


def suffix_of(module: str) -> str:
    """The last part of a module path: ``q_proj`` of ``model.layers.0.self_attn.q_proj``."""
    return module.rpartition(".")[2]


def kind_of(module: str) -> str:
    """ "row" (the input is split) or "column" (the output is split)."""
    return "row" if suffix_of(module) in ROW_MODULES else "column"


def features_of(
    name: str,
    config: AdapterConfig,
    stored: Mapping[str, Mapping[Factor, tuple[int, ...]]],
    base: BaseSizes | None = None,
) -> dict[str, tuple[int, int]]:
    """(in, out) of every module's base layer: from the base model where it is known, else from the stored shapes."""
    features = {}
    for module, factors in stored.items():
        suffix = suffix_of(module)
        if MODULE_PATH.fullmatch(module) is None or suffix not in _SUFFIXES:
            raise AdapterError(
                name,
                "weights for a module that cannot be adapted",
                f"modules of decoder layers among {', '.join(_SUFFIXES)}",
                "Train without it in target_modules.",
                module,
            )
        n = config.nblocks if config.structure_of(name, module) == "block_a" else 1
        found = (factors["A"][1] * n, factors["B"][0])
        features[module] = base.features()[suffix] if base else found
    return features


_SUFFIXES = (*(part for parts in FUSED.values() for part in parts), *ROW_MODULES, *FUSED)


def standalone_spec(
    name: str, features: Features, dtype: torch.dtype, tp_rank: int, tp_size: int, base: BaseSizes | None = None
) -> ModelSpec:
    """The linears of ``features`` as TP rank ``tp_rank`` of ``tp_size`` holds them, fused as SGLang fuses them.

    features  module path -> (in, out)
    Without ``base`` the axis of K and V is cut evenly even where KV heads would be replicated.
    """
    share = _Shares(base, tp_rank, tp_size)
    groups: dict[tuple[int, str], dict[str, str]] = {}
    for module in features:
        match = MODULE_PATH.fullmatch(module)
        assert match is not None, "features_of has checked it"
        parent, _, suffix = module.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if suffix in (key, *parts)), suffix)
        groups.setdefault((int(match["layer"]), f"{parent}.{fused}"), {})[suffix] = module
    layers: dict[int, list[LinearSpec]] = {}
    for (layer, path), members in sorted(groups.items()):
        layers.setdefault(layer, []).append(_linear(name, path, members, features, share))
    kv_width = share.kv_heads_local * base.head_dim if base else ANY_ROW_WIDTH
    row_width = -(-kv_width // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS  # as a server rounds it
    return ModelSpec(
        layers=tuple(tuple(layers[layer]) for layer in sorted(layers)),
        row_width=row_width,
        dtype=dtype,
        vocab_size=base.vocab if base else sys.maxsize,
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


@dataclass(frozen=True)
class _Shares:
    """How a TP rank's part of an axis is found."""

    base: BaseSizes | None
    rank: int
    size: int

    @property
    def kv_heads_local(self) -> int:
        assert self.base is not None
        return -(-self.base.kv_heads // self.size)

    def even(self, total: int, unit: int = 1) -> Interval:
        """Parts of whole units, rounded up: the last TP ranks may hold padding."""
        length = -(-total // (unit * self.size)) * unit
        return Interval(length * self.rank, length * (self.rank + 1), total)

    def query(self, total: int) -> Interval:
        return self.even(total, self.base.head_dim if self.base else 1)

    def key_value(self, total: int) -> Interval:
        """Replicated where there are more TP ranks than KV heads."""
        if self.base is None:
            return self.even(total)
        replicas = max(1, self.size // self.base.kv_heads)
        length = self.kv_heads_local * self.base.head_dim
        first = self.rank // replicas
        return Interval(length * first, length * (first + 1), total)


def _linear(name: str, path: str, members: Mapping[str, str], features: Features, share: _Shares) -> LinearSpec:
    fused = suffix_of(path)
    in_features = {features[module][0] for module in members.values()}
    if len(in_features) > 1:
        raise AdapterError(
            name,
            f"modules with inputs of {sorted(in_features)}",
            "one input width, since they read the same activations",
            "Check that adapter_config.json belongs to these weights.",
            path,
        )
    (inputs,) = in_features
    whole = Interval(0, inputs, inputs)
    if fused not in FUSED:
        module = members[fused]
        out = features[module][1]
        output = Interval(0, out, out)
        sources = {module: Source((0,), (0,), out)}
        return LinearSpec(name=path, kind="row", inputs=share.even(inputs), outputs=(output,), sources=sources)
    sizes = _slice_sizes(name, path, members, features, share.base)
    cut = (share.query, share.key_value, share.key_value) if fused == "qkv_proj" else (share.even, share.even)
    outputs = tuple(one(size) for one, size in zip(cut, sizes, strict=True))
    offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    sources = {}
    for suffix, module in members.items():
        if suffix == fused:
            sources[module] = Source(tuple(range(len(sizes))), offsets, sum(sizes))
        else:
            index = FUSED[fused].index(suffix)
            sources[module] = Source((index,), (0,), sizes[index])
    return LinearSpec(name=path, kind="column", inputs=whole, outputs=outputs, sources=sources)


def _slice_sizes(
    name: str, path: str, members: Mapping[str, str], features: Features, base: BaseSizes | None
) -> list[int]:
    """Rows of each slice of a fused linear; 0 for one that the adapter leaves alone and nothing tells about."""
    fused = suffix_of(path)
    if base is not None:
        return [base.features()[part][1] for part in FUSED[fused]]
    if fused not in members:
        return [features[members[part]][1] if part in members else 0 for part in FUSED[fused]]
    total = features[members[fused]][1]
    if fused == "gate_up_proj":
        return [total // 2, total // 2]
    o_proj = features.get(f"{path.rpartition('.')[0]}.o_proj")
    if o_proj is None:
        raise AdapterError(
            name,
            "a fused qkv_proj without o_proj",
            "the base model's sizes, to tell Q from K and V",
            "Give --base-model.",
            path,
        )
    return [o_proj[0], (total - o_proj[0]) // 2, (total - o_proj[0]) // 2]
