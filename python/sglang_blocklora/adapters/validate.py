"""Every check that needs only the config and the header of the weights: the same answer on every TP rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError, brief
from sglang_blocklora.adapters.tensor_names import Places
from sglang_blocklora.sharding.architectures import ABSORBED, MODULES, suffix_of
from sglang_blocklora.sharding.cut import Factor, ModuleShape
from sglang_blocklora.sharding.linears import LinearSpec, ModelSpec
from sglang_blocklora.sharding.vocabulary import KINDS


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the weights that a linear of the base model gets.

    name     its path in the model that was trained, as the weights and the config have it
    scaling  what B @ A is multiplied with
    """

    name: str
    shape: ModuleShape
    scaling: float


def check_modules(
    adapter: str,
    config: AdapterConfig,
    stored: Mapping[str, Mapping[Factor, tuple[int, int]]],
    spec: ModelSpec,
    max_rank: int,
) -> dict[str, AdaptedModule]:
    """What each module of the base model gets (by its path there), or ``AdapterError``: all that is stored is placed.

    stored    shapes of lora_A and lora_B as in the file
    max_rank  largest full LoRA rank that is accepted
    """
    if any(token >= spec.vocab_size for token in config.invocation):
        raise AdapterError(
            adapter,
            f"alora_invocation_tokens = {brief(list(config.invocation))}",
            f"token ids of the base model, below {spec.vocab_size}",
            "Check that the adapter was trained on this base model: no prompt could activate it.",
        )
    positions = spec.find()
    places = Places(positions)
    modules: dict[str, AdaptedModule] = {}
    fed: dict[tuple[int, int, int], str] = {}
    for name, factors in stored.items():
        place = places.find(name)
        if place is None:
            raise _unknown_module(adapter, name, spec, positions)
        tied = config.ties_weights and suffix_of(name) in KINDS
        if not tied and not config.targets.selects(name):
            raise AdapterError(
                adapter,
                "weights for a module that adapter_config.json does not select (target_modules, exclude_modules, "
                "layers_to_transform)",
                "weights of selected modules only: PEFT leaves out the others",
                "Check that adapter_config.json belongs to these weights.",
                name,
            )
        layer, index = positions[place]
        linear = spec.layers[layer][index]
        for slice_index in linear.sources[place].slices:
            other = fed.setdefault((layer, index, slice_index), name)
            if other != name:
                raise AdapterError(
                    adapter,
                    f"weights for it and for {other!r}, which are the same layer of the base model",
                    "one of the two (a fused module or its parts, one name of a layer)",
                    "Train with one of the two in target_modules.",
                    name,
                )
        if linear.part == "embedding":
            _check_embedding(adapter, name, config)
        shape = _check_shape(adapter, name, config, factors, linear, linear.sources[place].size, max_rank)
        modules[place] = AdaptedModule(name, shape, config.scaling_of(name))
    return modules


def _check_shape(
    adapter: str,
    module: str,
    config: AdapterConfig,
    factors: Mapping[Factor, tuple[int, ...]],
    linear: LinearSpec,
    out_features: int,
    max_rank: int,
) -> ModuleShape:
    rank = config.rank_of(module)
    structure = config.structure_of(adapter, module)
    n = 1 if structure == "plain" else config.nblocks
    in_features = linear.inputs.size
    if rank > max_rank:
        raise AdapterError(
            adapter, f"rank {rank}", f"at most {max_rank}", "Start the server with a larger --max-lora-rank.", module
        )
    axis, size = ("in", in_features) if structure == "block_a" else ("out", out_features)
    if rank % n or size % n:
        raise AdapterError(
            adapter,
            f"rank {rank} and {axis}_features {size} with nblocks = {n}",
            f"both to be multiples of {n}",
            "Correct use_bdlora.nblocks or r in adapter_config.json; PEFT trains no other shapes.",
            module,
        )
    shape = ModuleShape(rank, n, structure)
    expected = shape.stored_shapes(in_features, out_features)
    found = (factors["A"], factors["B"])
    if found != expected:
        raise AdapterError(
            adapter,
            f"lora_A {list(found[0])} and lora_B {list(found[1])}",
            f"{list(expected[0])} and {list(expected[1])} (rank {rank}, {structure}, nblocks {n}, base layer "
            f"{in_features} -> {out_features})",
            "Check that the adapter was trained on this base model and that adapter_config.json is its own.",
            module,
        )
    return shape


def _check_embedding(adapter: str, module: str, config: AdapterConfig) -> None:
    """PEFT's ``Embedding`` knows neither blocks nor invocations."""
    blocks = config.structure_of(adapter, module) != "plain"
    if blocks or config.invocation:
        key = "use_bdlora" if blocks else "alora_invocation_tokens"
        raise AdapterError(
            adapter,
            f"{key} on embeddings",
            "a plain adapter there, as PEFT trains it",
            f"Train without embed_tokens in target_modules, or without {key}.",
            module,
        )


def _unknown_module(adapter: str, module: str, spec: ModelSpec, places: Collection[str]) -> AdapterError:
    names = {suffix_of(place) for place in places}
    served = [name for name in (*MODULES, *KINDS) if name in names or not names]
    if Places(spec.left_out).find(module):
        return AdapterError(
            adapter,
            "weights for a module that --lora-target-modules leaves out",
            f"modules among {', '.join(served)}, which this server adapts",
            "Start the server with the module in --lora-target-modules, or with --lora-target-modules all.",
            module,
        )
    if suffix_of(module) in KINDS and spec.no_vocabulary:
        why = f"Embeddings and head of this base model cannot have adapters ({spec.no_vocabulary}): train without them"
    elif "experts" in module:
        why = (
            f"Experts of this base model cannot have adapters ({spec.no_experts}): train without them"
            if spec.no_experts
            else "It has no such expert, or other names for it: check target_modules and target_parameters"
        )
    elif any(part in module for part in ("vision", "visual", "audio")):
        why = "Only the language model's decoder layers are served: train without the other towers in target_modules"
    elif suffix_of(module) == ABSORBED:
        why = f"SGLang multiplies {ABSORBED} into attention, where no adapter joins: train without it in target_modules"
    else:
        why = (
            "This base model has no such linear (too few layers, another architecture), or it is not served: train "
            "without it in target_modules"
        )
    return AdapterError(
        adapter,
        "weights for a module that cannot be adapted here",
        f"modules of {len(spec.layers)} decoder layers among {', '.join(served)}",
        f"{why}, and check that the base model is the right one.",
        module,
    )
