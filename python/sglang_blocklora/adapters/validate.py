"""Every check that needs only the config and the header of the weights: the same answer on every TP rank."""

from __future__ import annotations

from collections.abc import Mapping

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sharding.cut import Factor, ModuleShape
from sglang_blocklora.sharding.linears import LinearSpec, ModelSpec


def check_modules(
    adapter: str,
    config: AdapterConfig,
    stored: Mapping[str, Mapping[Factor, tuple[int, ...]]],
    spec: ModelSpec,
    max_rank: int,
) -> dict[str, ModuleShape]:
    """Shape of every checkpoint module, or ``AdapterError``.

    stored    shapes of lora_A and lora_B as in the file
    max_rank  largest full LoRA rank that is accepted
    """
    places = spec.find()
    shapes: dict[str, ModuleShape] = {}
    fed: dict[tuple[int, int, int], str] = {}
    for module, factors in stored.items():
        if module not in places:
            raise _unknown_module(adapter, module, places)
        layer, index = places[module]
        linear = spec.layers[layer][index]
        for slice_index in linear.sources[module].slices:
            other = fed.setdefault((layer, index, slice_index), module)
            if other != module:
                raise AdapterError(
                    adapter,
                    f"weights for it and for {other!r}, which are the same layer",
                    "either the fused module or its parts",
                    "Train with one of the two in target_modules.",
                    module,
                )
        shapes[module] = _check_shape(adapter, module, config, factors, linear, max_rank)
    return shapes


def _check_shape(
    adapter: str,
    module: str,
    config: AdapterConfig,
    factors: Mapping[Factor, tuple[int, ...]],
    linear: LinearSpec,
    max_rank: int,
) -> ModuleShape:
    rank = config.rank_of(module)
    structure = config.structure_of(adapter, module)
    n = 1 if structure == "plain" else config.nblocks
    in_features, out_features = linear.inputs.size, linear.sources[module].size
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
    found = (tuple(factors["A"]), tuple(factors["B"]))
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


def _unknown_module(adapter: str, module: str, places: Mapping[str, object]) -> AdapterError:
    known = sorted({place.rsplit(".", 1)[-1] for place in places})
    if "embed" in module or module.endswith("lm_head"):
        why = "Embeddings and lm_head are not served"
    elif "experts" in module:
        why = "MoE experts are not served"
    else:
        why = "This base model has no such linear, or it is not served"
    return AdapterError(
        adapter,
        "weights for a module that cannot be adapted here",
        f"modules of decoder layers among {', '.join(known)}",
        f"{why}: train without it in target_modules, and check that the base model is the right one.",
        module,
    )
