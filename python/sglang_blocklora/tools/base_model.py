"""Finds the base model's sizes without a server: from its ``config.json``, or from an adapter alone.

An adapter's shapes give the widths of the axes that it touches. What they do not give is how wide a head is and how
many KV heads there are; that comes from the base model's ``config.json``, where it is at hand.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sharding.architectures import (
    ARCHITECTURES,
    LATENTS,
    MODULES,
    QUERY,
    UNGATED,
    WHOLE_VOCABULARY,
    Axes,
    Axis,
    Linear,
    kind_of,
    model_spec,
    served_with,
    suffix_of,
)
from sglang_blocklora.sharding.cut import Factor
from sglang_blocklora.sharding.linears import Interval, ModelSpec
from sglang_blocklora.sharding.vocabulary import EMBEDDING, HEAD, KINDS, Vocabulary

# Row width where the base model is unknown: the layout then is an example, its padding is not reported.
ANY_ROW_WIDTH = 1024
LAYER_NUMBER = re.compile(r".*\blayers\.(?P<number>\d+)\..+", re.DOTALL)
# SGLang's CPU engine rounds the intermediate width of a TP rank up to a multiple of this.
CPU_INTERMEDIATE = 32
# SGLang rounds the vocabulary up to a multiple of this; of this times the TP size where TP does not divide that.
VOCABULARY = 64
AXES: tuple[Axis, ...] = ("hidden", "query", "key_value", "intermediate")
# By which of these a config says how many experts its layers have.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

Engine = Literal["gpu", "cpu"]
Stored = Mapping[str, Mapping[Factor, tuple[int, int]]]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Sizes of multi-head latent attention.

    query       width of the queries' latent; 0 where they have none
    key_value   width of a token's row in the KV cache
    query_head  of a head of queries, and value_head: of one of values
    """

    query: int
    key_value: int
    query_head: int
    value_head: int

    @staticmethod
    def of(raw: Mapping[str, Any]) -> Latents:
        """From what a ``config.json`` holds. ``KeyError`` or ``TypeError`` where it lacks a size."""
        positions = raw["qk_rope_head_dim"]
        return Latents(
            query=raw.get("q_lora_rank") or 0,
            key_value=raw["kv_lora_rank"] + positions,
            query_head=raw["qk_nope_head_dim"] + positions,
            value_head=raw["v_head_dim"],
        )

    def widths(self, heads: int) -> dict[Axis, int]:
        """Those of the attention's axes."""
        widths: dict[Axis, int] = {"query": heads * self.query_head, "value": heads * self.value_head}
        widths["latent"] = self.key_value
        return widths | ({"query_latent": self.query} if self.query else {})

    def axes(self, heads: int, own: int, tp_rank: int) -> Axes:
        """What a TP rank holds of them, which has ``own`` of the heads."""
        whole = self.widths(heads)
        axes: dict[Axis, Interval] = {axis: Interval(0, width, width) for axis, width in whole.items()}
        axes["query"] = _part(own * self.query_head, tp_rank, whole["query"])
        axes["value"] = _part(own * self.value_head, tp_rank, whole["value"])
        return axes


@dataclass(frozen=True, kw_only=True)
class BaseSizes:
    """Sizes of a base model, as its Hugging Face ``config.json`` names them.

    expert_layers  numbers of layers that have experts in the place of an MLP
    experts        how many each of them has that adapters can be on, and expert_width: the intermediate width of one
    gated          whether its MLPs have a gate
    compared       whether its architecture was compared with PEFT; a server checks the linears of others at load
    splits_vocabulary  whether TP ranks have parts of the embeddings, so that adapters can be on them
    latents        where its attention has latents in the place of keys and values
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    expert_layers: frozenset[int] = frozenset()
    experts: int = 0
    expert_width: int = 0
    gated: bool = True
    compared: bool = True
    splits_vocabulary: bool = True
    latents: Latents | None = None

    @staticmethod
    def read(path: Path) -> BaseSizes:
        """From a model folder or its ``config.json``.

        ``ValueError`` if it is not there, lacks a size, or cannot be served.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            return BaseSizes.of(raw)
        except OSError as error:
            raise ValueError(f"base model: cannot read {file} ({error.strerror}); give the model's folder") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"base model: {file} is not the config of a decoder ({error!r})") from error

    @staticmethod
    def of(raw: Mapping[str, Any]) -> BaseSizes:
        """From what a ``config.json`` holds. ``KeyError`` or ``TypeError`` where it lacks a size."""
        heads, architectures = raw["num_attention_heads"], raw.get("architectures") or ()
        return BaseSizes(
            hidden=raw["hidden_size"],
            intermediate=raw.get("intermediate_size") or raw["moe_intermediate_size"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            layers=raw["num_hidden_layers"],
            vocab=raw["vocab_size"],
            expert_layers=_expert_layers(raw),
            experts=next((raw[key] for key in EXPERT_COUNTS if raw.get(key)), 0) if _unscaled(raw) else 0,
            expert_width=raw.get("moe_intermediate_size") or raw["intermediate_size"],
            gated=set(architectures).isdisjoint(UNGATED),
            compared=not architectures or not set(architectures).isdisjoint(ARCHITECTURES),
            splits_vocabulary=set(architectures).isdisjoint(WHOLE_VOCABULARY),
            latents=Latents.of(raw) if raw.get("kv_lora_rank") else None,
        )

    @property
    def mlp_axis(self) -> Axis:
        return "intermediate" if self.gated else "ungated"

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Those that a layer with an MLP has."""
        return served_with(self.widths)

    @property
    def widths(self) -> dict[Axis, int]:
        widths: dict[Axis, int] = {"hidden": self.hidden, self.mlp_axis: self.intermediate}
        if self.latents is None:
            return widths | {"query": self.heads * self.head_dim, "key_value": self.kv_heads * self.head_dim}
        return widths | self.latents.widths(self.heads)

    def features(self) -> dict[str, tuple[int, int]]:
        """Module name -> (in, out) of every linear that an adapter can have."""
        widths = self.widths
        sizes = {part: (widths[one.inputs], widths[one.parts[part]]) for one in self.linears for part in one.parts}
        for linear in self.linears:
            sizes[linear.name] = (widths[linear.inputs], sum(widths[axis] for axis in linear.parts.values()))
        return sizes

    def axes(self, tp_rank: int, tp_size: int, engine: Engine) -> Axes:
        """What a TP rank holds of each axis; see ``engine_for``."""
        if engine == "gpu":
            heads, replicas = self.heads // tp_size, max(1, tp_size // self.kv_heads)
            kv_heads, unit = max(1, self.kv_heads // tp_size), 1
        else:
            kv_heads, replicas = self.kv_heads // tp_size, 1
            heads = self.heads // tp_size
            if self.heads % tp_size or self.kv_heads % tp_size:  # whole groups of heads on every rank
                kv_heads = -(-self.kv_heads // tp_size)
                heads = kv_heads * (self.heads // self.kv_heads)
            unit = CPU_INTERMEDIATE
        widths = self.widths
        if self.latents is None:
            attention: Axes = {
                "query": _part(heads * self.head_dim, tp_rank, widths["query"]),
                "key_value": _part(kv_heads * self.head_dim, tp_rank // replicas, widths["key_value"]),
            }
        else:
            attention = self.latents.axes(self.heads, heads, tp_rank)
        return {
            "hidden": Interval(0, self.hidden, self.hidden),
            **attention,
            self.mlp_axis: _part(-(-self.intermediate // (unit * tp_size)) * unit, tp_rank, self.intermediate),
            "expert": _part(-(-self.expert_width // (unit * tp_size)) * unit, tp_rank, self.expert_width),
        }

    def engine_for(self, tp_size: int) -> Engine:
        """ "gpu" where a GPU can serve at ``tp_size``; elsewhere "cpu", whose engine pads until it divides."""
        divides = not (self.heads % tp_size or self.intermediate % tp_size)
        return "gpu" if divides and not (self.kv_heads % tp_size and tp_size % self.kv_heads) else "cpu"

    def spec(self, dtype: torch.dtype, tp_rank: int, tp_size: int) -> ModelSpec:
        """All linears of the base model as one TP rank holds them."""
        axes = self.axes(tp_rank, tp_size, self.engine_for(tp_size))
        dense: Axes = {axis: part for axis, part in axes.items() if axis != "expert"}
        sparse: Axes = {axis: part for axis, part in axes.items() if axis != self.mlp_axis}
        paths = [f"model.layers.{layer}" for layer in range(self.layers)]
        return model_spec(
            {path: sparse if layer in self.expert_layers else dense for layer, path in enumerate(paths)},
            experts={paths[layer]: self.experts for layer in self.expert_layers},
            vocabulary=_vocabulary(self.vocab, tp_rank, tp_size) if self.splits_vocabulary else None,
            dtype=dtype,
            vocab_size=self.vocab,
            tp_rank=tp_rank,
            tp_size=tp_size,
        )


@dataclass(frozen=True)
class KnownSizes:
    """What an adapter tells of its base model: widths of axes and vocabulary (0 where it says nothing), and layers."""

    widths: Mapping[Axis, int]
    vocab: int
    layers: tuple[str, ...]

    @staticmethod
    def of(name: str, config: AdapterConfig, stored: Stored) -> KnownSizes:
        """From the stored shapes. ``AdapterError`` where they contradict each other or leave the model open."""
        widths: dict[Axis, int] = {}
        vocabulary: dict[str, int] = {}
        fused = []
        layers = set()
        for module, factors in stored.items():
            if ".experts." in module:
                advice = "Give --base-model."
                raise AdapterError(
                    name, "weights on experts", "the base model's number and width of them", advice, module
                )
            if suffix_of(module) in KINDS:
                (_, inputs), (outputs, _) = factors["A"], factors["B"]
                hidden, vocab = (outputs, inputs) if kind_of(module) == "row" else (inputs, outputs)
                _measure(name, module, widths, "hidden", hidden)
                _measure(name, module, vocabulary, "vocabulary", vocab)
                continue
            match, linear = LAYER_NUMBER.fullmatch(module), MODULES.get(suffix_of(module))
            if match is None or linear is None:
                continue  # refused when it finds no place
            if linear in (LATENTS, QUERY):
                raise AdapterError(
                    name, "weights on latents", "the base model's sizes of them", "Give --base-model.", module
                )
            layers.add(match["number"])
            n = config.nblocks if config.structure_of(name, module) == "block_a" else 1
            _measure(name, module, widths, linear.inputs, factors["A"][1] * n)
            if suffix_of(module) in linear.parts:
                _measure(name, module, widths, linear.parts[suffix_of(module)], factors["B"][0])
            else:
                fused.append((module, factors["B"][0]))
        for module, rows in fused:
            axes = list(MODULES[suffix_of(module)].parts.values())
            unknown = {axis for axis in axes if axis not in widths}
            if len(unknown) > 1:
                raise AdapterError(
                    name,
                    "a fused qkv_proj without o_proj",
                    "the base model's sizes, to tell Q from K and V",
                    "Give --base-model.",
                    module,
                )
            rest = rows - sum(widths[axis] for axis in axes if axis in widths)
            for axis in unknown:
                _measure(name, module, widths, axis, max(rest, 0) // axes.count(axis))
        numbers = sorted(layers, key=lambda number: (len(number), number))
        return KnownSizes(
            {axis: widths.get(axis, 0) for axis in AXES}, vocabulary.get("vocabulary", 0), tuple(numbers) or ("0",)
        )

    def spec(self, dtype: torch.dtype, tp_rank: int, tp_size: int) -> ModelSpec:
        """The adapted layers as one TP rank holds them; every axis is cut evenly, K and V's too."""
        axes: dict[Axis, Interval] = {
            axis: _part(-(-width // tp_size), tp_rank, width) for axis, width in self.widths.items()
        }
        axes["hidden"] = Interval(0, self.widths["hidden"], self.widths["hidden"])
        layers = {f"model.layers.{number}": axes for number in self.layers}
        spec = model_spec(
            layers,
            vocabulary=_vocabulary(self.vocab, tp_rank, tp_size) if self.vocab else None,
            dtype=dtype,
            vocab_size=sys.maxsize,
            tp_rank=tp_rank,
            tp_size=tp_size,
        )
        return dataclasses.replace(spec, row_width=ANY_ROW_WIDTH)


def _unscaled(raw: Mapping[str, Any]) -> bool:
    """Whether experts' outputs are added up as they are: adapters can be on such ones only."""
    return raw.get("routed_scaling_factor") in (None, 1.0)


def _expert_layers(raw: Mapping[str, Any]) -> frozenset[int]:
    """Which layers have experts: all, or what a config leaves out by one of these keys."""
    if all(not raw.get(key) for key in EXPERT_COUNTS):
        return frozenset()
    dense, step = set(raw.get("mlp_only_layers") or ()), raw.get("decoder_sparse_step") or 1
    first = raw.get("first_k_dense_replace") or 0
    return frozenset(i for i in range(first, raw["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0)


def _measure(name: str, module: str, widths: dict[T, int], axis: T, width: int) -> None:
    known = widths.setdefault(axis, width)
    if known != width:
        raise AdapterError(
            name,
            f"a width of {width} where other modules have {known}",
            "one width, since they read or write the same activations",
            "Check that adapter_config.json belongs to these weights.",
            module,
        )


def _vocabulary(size: int, tp_rank: int, tp_size: int) -> Vocabulary:
    unit = VOCABULARY if -(-size // VOCABULARY) * VOCABULARY % tp_size == 0 else VOCABULARY * tp_size
    ids = _part(-(-size // unit) * unit // tp_size, tp_rank, size)
    return Vocabulary(f"model.{EMBEDDING}", HEAD, ids)


def _part(length: int, index: int, size: int) -> Interval:
    """Part ``index`` of an axis of ``size`` in parts of ``length``: the last may hold padding."""
    return Interval(length * index, length * (index + 1), size)
