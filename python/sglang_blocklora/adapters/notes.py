"""Tells a user, once, which parts of a served adapter's folder change nothing, and what costs more than it need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from sglang_blocklora.adapters.config import CONFIG_NAME, AdapterConfig
from sglang_blocklora.adapters.errors import listed
from sglang_blocklora.adapters.tokenizer_files import chat_template
from sglang_blocklora.adapters.validate import AdaptedModule
from sglang_blocklora.sharding.architectures import names_of_kind
from sglang_blocklora.sharding.linears import ModelSpec


def notes(
    adapter: str, folder: Path, config: AdapterConfig, modules: Mapping[str, AdaptedModule], spec: ModelSpec
) -> Iterator[str]:
    """One sentence or two for each. Raises ``AdapterError`` for a file that cannot be understood."""
    if config.unused:
        yield f"not used in {CONFIG_NAME}: {', '.join(config.unused)}."
    missing = config.targets.without_weights(module.name for module in modules.values())
    if missing:
        yield f"target_modules of {CONFIG_NAME} names {listed(missing)}, without weights here: not adapted, as in PEFT."
    template = chat_template(adapter, folder)
    if template:
        yield (
            f"{template} in the adapter's folder is not used: chats are put into text by the base model's template, or "
            "the one of --chat-template."
        )
    dense = _made_dense(modules, spec)
    if dense:
        yield (
            f"{len(dense)} modules ({listed(dense)}) are block-diagonal in the orientation that tensor parallelism "
            f"cannot split (A-blocks belong on {names_of_kind('row')}, B-blocks on {names_of_kind('column')}). They "
            "are served as plain LoRA: right, but every TP rank holds and computes the packed factor as a dense one."
        )


def _made_dense(modules: Mapping[str, AdaptedModule], spec: ModelSpec) -> list[str]:
    """Modules whose blocks run along the axis that tensor parallelism does not split."""
    positions = spec.find()
    found = []
    for place, module in modules.items():
        layer, index = positions[place]
        if module.shape.made_dense(spec.layers[layer][index].kind):
            found.append(place)
    return sorted(found)
