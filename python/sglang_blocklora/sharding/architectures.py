"""The one table of what is served: architectures, the linears of their decoder layers, and the modules' names.

Server, tools and messages read it. TP ranks differ in what they hold of four axes; all else follows from the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from sglang_blocklora.sharding.layout import ALIGNMENT_ELEMENTS
from sglang_blocklora.sharding.linears import Interval, LinearSpec, ModelSpec, Source
from sglang_blocklora.sharding.vocabulary import KINDS, Vocabulary, cut_vocabulary

# Architectures whose MLPs have no gate.
UNGATED = ("ArceeForCausalLM", "ApertusForCausalLM")
# Architectures whose linears were compared with PEFT token by token (test/e2e). Another one may order or gate its
# fused outputs differently, and would then answer wrongly in silence.
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "Olmo2ForCausalLM",
    "Glm4ForCausalLM",
    "StableLmForCausalLM",
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Gemma3ForCausalLM",
    "Ministral3ForCausalLM",
    *UNGATED,
    # with experts
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    # with multi-head latent attention
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
)
# Of these, each TP rank holds all embeddings: adapters on them and on the head are refused.
WHOLE_VOCABULARY = ("Gemma3ForCausalLM",)

Axis = Literal["hidden", "query", "key_value", "query_latent", "latent", "value", "intermediate", "ungated", "expert"]
# What a TP rank holds of each axis; all of "hidden", which is not split. A layer of experts has "expert", the
# intermediate width of one, in the place of "intermediate", and one whose MLP has no gate has "ungated". Multi-head
# latent attention has "latent", a token's row in the KV cache (kv_lora_rank and the part with positions), and "value",
# what its heads put out, in the place of "key_value"; "query_latent" where queries have a latent too. Latents are not
# split.
Axes = Mapping[Axis, Interval]


class Linear(NamedTuple):
    """A linear of a decoder layer as SGLang has it.

    path   below the layer; its last part is also the name of the checkpoint module that is fused like it (Phi-3)
    parts  checkpoint modules that it is made of -> the axis of their rows, in the order of the linear's rows
    """

    path: str
    kind: Literal["column", "row"]
    inputs: Axis
    parts: Mapping[str, Axis]

    @property
    def parent(self) -> str:
        """The path without its last part, which the linear's modules share."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


class Experts(NamedTuple):
    """How a decoder layer's experts are called.

    path   below the layer, of SGLang's module for all of them
    parts  what checkpoints call an expert's linears: gate, up, down
    """

    path: str
    parts: tuple[str, str, str]


QKV = Linear(
    "self_attn.qkv_proj", "column", "hidden", {"q_proj": "query", "k_proj": "key_value", "v_proj": "key_value"}
)
O = Linear("self_attn.o_proj", "row", "query", {"o_proj": "hidden"})  # noqa: E741  as everybody calls it
# Of multi-head latent attention.
LATENT_QUERY = Linear("self_attn.q_proj", "column", "hidden", {"q_proj": "query"})
LATENT = Linear("self_attn.kv_a_proj_with_mqa", "column", "hidden", {"kv_a_proj_with_mqa": "latent"})
LATENTS = Linear(
    "self_attn.fused_qkv_a_proj_with_mqa",
    "column",
    "hidden",
    {"q_a_proj": "query_latent", "kv_a_proj_with_mqa": "latent"},
)
QUERY = Linear("self_attn.q_b_proj", "column", "query_latent", {"q_b_proj": "query"})
LATENT_O = Linear("self_attn.o_proj", "row", "value", {"o_proj": "hidden"})
# Its linear from latents to keys and values is not adapted: SGLang multiplies its weights into queries and outputs.
ABSORBED = "kv_b_proj"
# In the order in which a layer runs them; a layer's attention is the first of these whose linears, or axes, it has.
ATTENTIONS = ((QKV, O), (LATENTS, QUERY, LATENT_O), (LATENT_QUERY, LATENT, LATENT_O))
GATE_UP = Linear("mlp.gate_up_proj", "column", "hidden", {"gate_proj": "intermediate", "up_proj": "intermediate"})
DOWN = Linear("mlp.down_proj", "row", "intermediate", {"down_proj": "hidden"})
# Of an MLP without a gate.
UP = Linear("mlp.up_proj", "column", "hidden", {"up_proj": "ungated"})
UNGATED_DOWN = Linear("mlp.down_proj", "row", "ungated", {"down_proj": "hidden"})
# In the order in which a layer runs them; it has an MLP of one kind or none.
MLPS = ((GATE_UP, DOWN), (UP, UNGATED_DOWN))
LINEARS = tuple(linear for group in (ATTENTIONS[0], *MLPS, *ATTENTIONS[1:]) for linear in group)
EXPERTS = (
    Experts("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    Experts("block_sparse_moe.experts", ("w1", "w3", "w2")),  # Mixtral's, before transformers 5
)
# Where transformers 5 has the weights of all experts of a layer, and what it calls them, in the order of the module.
# PEFT adapts them as parameters; what it has for expert 3 is called ``mlp.experts.gate_up_proj[3]`` here.
FUSED_EXPERTS = "mlp.experts"
FUSED_PARTS = ("gate_up_proj", "down_proj")
# Names of the modules that an adapter may have: as most checkpoints split them, and all.
SPLIT_MODULES = tuple(dict.fromkeys(part for linear in LINEARS for part in linear.parts))
MODULES: Mapping[str, Linear] = {
    # An MLP without a gate has no names of its own.
    **{part: linear for linear in (QKV, O, *MLPS[0], LATENTS, QUERY) for part in (*linear.parts, linear.name)},
    **{part: linear for _, parts in EXPERTS for part, linear in zip(parts, (GATE_UP, GATE_UP, DOWN), strict=True)},
}


def suffix_of(module: str) -> str:
    """The last part of a module path, without the number of an expert: ``q_proj`` of ``model.layers.0.attn.q_proj``."""
    return module.rpartition(".")[2].partition("[")[0]


def kind_of(module: str) -> Literal["column", "row"]:
    """Whether the output of a module (its path or name) is split over TP ranks, or its input."""
    name = suffix_of(module)
    return KINDS[name][0] if name in KINDS else MODULES[name].kind


def names_of_kind(kind: Literal["column", "row"]) -> str:
    """The split modules of a kind, for messages."""
    return ", ".join(part for part in SPLIT_MODULES if kind_of(part) == kind)


def served(has: Callable[[Linear], bool]) -> tuple[Linear, ...]:
    """The linears of a decoder layer's attention and MLP, in its order: of each kind the first that it ``has`` all of.

    Nothing of attention or MLP where it has no kind of it whole.
    """

    def first(groups: Sequence[tuple[Linear, ...]]) -> tuple[Linear, ...]:
        return next((group for group in groups if all(map(has, group))), ())

    return (*first(ATTENTIONS), *first(MLPS))


def served_with(axes: Collection[Axis]) -> tuple[Linear, ...]:
    """The linears of a decoder layer that has these axes."""
    return served(lambda linear: {linear.inputs, *linear.parts.values()} <= {*axes})


def linears_of(layer: str, axes: Axes) -> tuple[LinearSpec, ...]:
    """The linears of the decoder layer at path ``layer`` on the TP rank that holds ``axes``, which the layer has."""
    specs = []
    for linear in served_with(axes):
        parent = f"{layer}.{linear.parent}"
        outputs = tuple(axes[axis] for axis in linear.parts.values())
        offsets = tuple(sum(one.size for one in outputs[:i]) for i in range(len(outputs)))
        sources = {
            f"{parent}.{part}": Source((i,), (0,), output.size)
            for i, (part, output) in enumerate(zip(linear.parts, outputs, strict=True))
        }
        if len(outputs) > 1:
            sizes = sum(one.size for one in outputs)
            sources[f"{parent}.{linear.name}"] = Source(tuple(range(len(outputs))), offsets, sizes)
        specs.append(
            LinearSpec(
                name=f"{layer}.{linear.path}",
                kind=linear.kind,
                inputs=axes[linear.inputs],
                outputs=outputs,
                sources=sources,
            )
        )
    return tuple(specs)


def experts_of(layer: str, axes: Axes, count: int) -> tuple[LinearSpec, ...]:
    """The linears of ``count`` experts of that layer, two for each."""
    return tuple(one for expert in range(count) for one in _expert(layer, expert, axes["hidden"], axes["expert"]))


def _expert(layer: str, expert: int, hidden: Interval, width: Interval) -> tuple[LinearSpec, LinearSpec]:
    """Gate and up in one, and down, of one expert."""
    fused = f"{layer}.{FUSED_EXPERTS}"
    first = {f"{fused}.{FUSED_PARTS[0]}[{expert}]": Source((0, 1), (0, width.size), 2 * width.size)}
    second = {f"{fused}.{FUSED_PARTS[1]}[{expert}]": Source((0,), (0,), hidden.size)}
    for path, (gate_name, up_name, down_name) in EXPERTS:
        own = f"{layer}.{path}.{expert}"
        first[f"{own}.{gate_name}"] = Source((0,), (0,), width.size)
        first[f"{own}.{up_name}"] = Source((1,), (0,), width.size)
        second[f"{own}.{down_name}"] = Source((0,), (0,), hidden.size)
    return (
        LinearSpec(
            name=f"{fused}.{expert}.{FUSED_PARTS[0]}",
            kind="column",
            inputs=hidden,
            outputs=(width, width),
            sources=first,
            part="expert",
        ),
        LinearSpec(
            name=f"{fused}.{expert}.{FUSED_PARTS[1]}",
            kind="row",
            inputs=width,
            outputs=(hidden,),
            sources=second,
            part="expert",
        ),
    )


def model_spec(
    layers: Mapping[str, Axes],
    *,
    experts: Mapping[str, int] | None = None,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype,
    vocab_size: int,
    tp_rank: int,
    tp_size: int,
    targets: Collection[str] = ("all",),
) -> ModelSpec:
    """The spec of a model on one TP rank.

    layers      path of each decoder layer -> what the TP rank holds of its axes
    experts     path of each layer that has experts to adapt -> how many
    vocabulary  where embeddings and head can be adapted
    targets     names of the modules that adapters may have; "all" for every one
    The row width is that of the model's KV cache, as a server rounds it.
    """
    kept_with: Sequence[tuple[LinearSpec, ...]] = [()] * len(layers)
    if vocabulary is not None and layers:
        hidden = next(iter(layers.values()))["hidden"]
        kept_with = cut_vocabulary(vocabulary, len(layers), hidden)
    whole = [
        linears_of(path, axes) + parts + experts_of(path, axes, (experts or {}).get(path, 0))
        for (path, axes), parts in zip(layers.items(), kept_with, strict=True)
    ]
    modules = {module for layer in whole for linear in layer for module in linear.sources}
    kept = {module for module in modules if "all" in targets or suffix_of(module) in targets}
    kv_width = max(((axes.get("key_value") or axes["latent"]).length for axes in layers.values()), default=0)
    return ModelSpec(
        layers=tuple(tuple(_only(linear, kept) for linear in layer) for layer in whole),
        row_width=-(-kv_width // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS,
        dtype=dtype,
        vocab_size=vocab_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        left_out=frozenset(modules - kept),
    )


def _only(linear: LinearSpec, kept: Collection[str]) -> LinearSpec:
    """``linear`` with the sources that are in ``kept``."""
    sources = {module: source for module, source in linear.sources.items() if module in kept}
    return dataclasses.replace(linear, sources=sources)
