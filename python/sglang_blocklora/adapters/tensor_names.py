"""Finds, by a tensor's name, which factor of which module of the base model it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from sglang_blocklora.sharding.cut import Factor

# The part behind lora_A is the adapter's name in the training run, which PEFT leaves out when it saves.
FACTOR_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight", re.DOTALL)
# Of embeddings PEFT has parameters, not modules.
EMBEDDING_NAME = re.compile(
    r"(?P<module>(?:.+\.)?embed_tokens)\.lora_embedding_(?P<factor>[AB])(?:\.[^.]+)?", re.DOTALL
)
# What PEFT saves beside factors on embeddings or head: their weights in the base model, of both.
BASE_WEIGHT = re.compile(r"(?:.+\.)?(?:embed_tokens|lm_head)(?:\.base_layer)?\.weight", re.DOTALL)
# Parts that PyTorch puts into a module's path: FSDP, torch.compile, activation checkpointing.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
PEFT_PREFIX = "base_model.model."
# What stands before the decoder's layers: the decoder of a vision-language model is its language_model, in whichever
# order; without a head there is no outer "model". Layers of a vision tower have more before them than these.
LAYER_PATH = re.compile(r"(?:(?:model|language_model)\.)*(?P<layer>layers\.\d+\..+|embed_tokens|lm_head)", re.DOTALL)


class FactorName(NamedTuple):
    """A factor of a linear; ``module`` is its path in the model that was trained, as PEFT names it in the config."""

    module: str
    factor: Factor


def parse_name(tensor: str) -> FactorName | None:
    """The factor that ``tensor`` is, or None where it is none of a linear layer or of embeddings."""
    match = EMBEDDING_NAME.fullmatch(tensor) or FACTOR_NAME.fullmatch(tensor)
    if match is None or "[" in match["module"]:  # which names one expert of a parameter
        return None
    if match.re is FACTOR_NAME and match["module"].endswith("embed_tokens"):
        return None  # PEFT does not train such
    return FactorName(_path(match["module"]), "A" if match["factor"] == "A" else "B")


def is_base_weight(tensor: str) -> bool:
    """Whether ``tensor`` is the whole weight of embeddings or head, as the base model has it."""
    return BASE_WEIGHT.fullmatch(tensor) is not None


def _path(module: str) -> str:
    return ".".join(part for part in module.split(".") if part not in WRAPPERS).removeprefix(PEFT_PREFIX)


class Places:
    """Module paths of the base model, found by the names that adapters have for them."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._paths = set(paths)
        self._of_layer: dict[str, list[str]] = {}
        for path in sorted(self._paths):
            self._of_layer.setdefault(_layer_path(path), []).append(path)

    def find(self, module: str) -> str | None:
        """The one module of the base model that ``module`` can mean, else None."""
        if module in self._paths:
            return module
        found = self._of_layer.get(_layer_path(module), [])
        return found[0] if len(found) == 1 else None


def _layer_path(module: str) -> str:
    match = LAYER_PATH.fullmatch(module)
    return match["layer"] if match else module


def why_not(tensor: str) -> str:
    """What to do about a tensor that is no factor of a linear layer."""
    if "lora_magnitude_vector" in tensor:
        return "DoRA is not served: train without use_dora."
    if "lora_embedding" in tensor:
        return "Of embeddings only embed_tokens can have an adapter: train without others in target_modules."
    if "modules_to_save" in tensor:
        return "Fully trained modules are not served: train without modules_to_save, or merge."
    if tensor.endswith(".bias"):
        return "Trained biases are not served: train with bias='none' and lora_bias=False."
    if "embed_tokens" in tensor or "lm_head" in tensor:
        return (
            "These are whole embeddings, which PEFT saves when they were trained (modules_to_save) or when the "
            "vocabulary was resized for new tokens. Neither is served: train without, or with an adapter on them "
            "(target_modules); or, if they are the base model's, save with save_embedding_layers=False."
        )
    return "Save it with PEFT's save_pretrained; fully trained modules are not served."
