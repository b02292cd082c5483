"""``adapter_config.json`` of PEFT: what is served, and a refusal for everything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sglang_blocklora.adapters.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
ADDED_TOKENS_NAME = "added_tokens.json"

T = TypeVar("T")
Structure = Literal["plain", "block_a", "block_b"]

# PEFT options that change the adapter's mathematics and are not served: key, why, what to do.
UNSUPPORTED_OPTIONS = (
    ("use_dora", "DoRA is not served", "Train without use_dora, or merge the adapter into the base model."),
    ("lora_bias", "lora_bias is not served (and PEFT drops it on block-diagonal modules)", "Train without lora_bias."),
    ("modules_to_save", "fully trained modules are not served", "Train without modules_to_save, or merge."),
    ("trainable_token_indices", "trained token embeddings are not served", "Train without trainable_token_indices."),
    ("target_parameters", "adapters on bare parameters (MoE experts) are not served", "Target linear modules only."),
    ("layer_replication", "replicated layers are not served", "Train without layer_replication."),
    ("alora_invocation_tokens", "activated LoRA is not served", "Train without alora_invocation_tokens."),
    ("megatron_config", "Megatron layers are not served", "Convert the adapter to plain PEFT linears."),
    ("use_qalora", "QALoRA is not served", "Train without use_qalora."),
    ("arrow_config", "Arrow routing is not served", "Serve the routed adapters one by one."),
    ("monteclora_config", "MonteCLoRA is not served", "Train without monteclora_config."),
    ("velora_config", "VeLoRA is not served", "Train without velora_config."),
    ("kasa_config", "KaSA is not served", "Train without kasa_config."),
)
# Initialisations that subtract from the base weights: the adapter is only right on that changed base model.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of ``adapter_config.json`` that decides an adapter's mathematics (names and meaning as in PEFT)."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    nblocks: int
    block_a_patterns: Sequence[str]
    block_b_patterns: Sequence[str]
    match_strict: bool
    block_diagonal: bool

    def rank_of(self, module: str) -> int:
        """Full LoRA rank of ``module`` (a module path of the base model): ``rank_pattern``, else ``r``."""
        return _match_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora; r is the module's full rank, never a block's."""
        rank = self.rank_of(module)
        alpha = _match_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def structure_of(self, adapter: str, module: str) -> Structure:
        """Which factor of ``module`` is packed block-diagonal. PEFT tests patterns as substrings of the full name."""
        if not self.block_diagonal:
            return "plain"
        in_a = any(pattern in module for pattern in self.block_a_patterns)
        in_b = any(pattern in module for pattern in self.block_b_patterns)
        if in_a and in_b:
            raise AdapterError(
                adapter,
                "a match in both target_modules_bd_a and target_modules_bd_b",
                "a match in one list at most",
                "Make the patterns of use_bdlora longer, so that each module matches one list.",
                module,
            )
        if in_a or in_b:
            return "block_a" if in_a else "block_b"
        if self.match_strict:
            raise AdapterError(
                adapter,
                "no match in target_modules_bd_a or target_modules_bd_b",
                "a match in one of them, since match_strict is true",
                "Add the module to a list, or set match_strict=false to have it plain.",
                module,
            )
        return "plain"


def _match_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's rule: the first key that matches the name as ``(.*\\.)?key$``."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_config(adapter: str, folder: Path, base_vocab_size: int) -> AdapterConfig:
    """Read and check ``folder/adapter_config.json``.

    base_vocab_size  token ids at or above it in ``added_tokens.json`` are new tokens, which are not served
    Raises ``AdapterError``.
    """
    raw = _read_json(adapter, folder / CONFIG_NAME)
    _refuse_unsupported(adapter, raw)
    _refuse_added_tokens(adapter, folder, base_vocab_size)
    rank = _positive_int(adapter, "r", raw.get("r"))
    bd = raw.get("use_bdlora") or {}
    if not isinstance(bd, dict):
        raise AdapterError(adapter, f"use_bdlora = {bd!r}", "an object or null", f"Mend {CONFIG_NAME}.")
    rank_pattern = {
        key: _positive_int(adapter, f"rank_pattern[{key!r}]", value)
        for key, value in (raw.get("rank_pattern") or {}).items()
    }
    alpha_pattern = {
        key: _number(adapter, f"alpha_pattern[{key!r}]", value)
        for key, value in (raw.get("alpha_pattern") or {}).items()
    }
    for key in (*rank_pattern, *alpha_pattern):
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(
                adapter, f"pattern {key!r} ({error})", "a regular expression", f"Mend the pattern in {CONFIG_NAME}."
            ) from error
    return AdapterConfig(
        rank=rank,
        alpha=_number(adapter, "lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=bool(raw.get("use_rslora", False)),
        nblocks=_positive_int(adapter, "use_bdlora.nblocks", bd.get("nblocks", 1)),
        block_a_patterns=_strings(adapter, bd, "target_modules_bd_a"),
        block_b_patterns=_strings(adapter, bd, "target_modules_bd_b"),
        match_strict=bool(bd.get("match_strict", True)),
        block_diagonal=bool(bd),
    )


def _read_json(adapter: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            adapter,
            f"no readable {path} ({error.strerror})",
            "a PEFT adapter folder",
            "Give the folder that holds adapter_config.json and adapter_model.safetensors.",
        ) from error
    except ValueError as error:
        raise AdapterError(adapter, f"{path} that is not JSON ({error})", "a JSON object", "Save it again.") from error
    if not isinstance(value, dict):
        raise AdapterError(adapter, f"{path} holding a {type(value).__name__}", "a JSON object", "Save it again.")
    return value


def _refuse_unsupported(adapter: str, raw: dict[str, Any]) -> None:
    peft_type = raw.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(adapter, f"peft_type {peft_type!r}", "'LORA'", "Only LoRA adapters are served.")
    for key, why, advice in UNSUPPORTED_OPTIONS:
        if raw.get(key):
            raise AdapterError(adapter, f"{key} = {raw[key]!r}", f"no {key}: {why}", advice)
    bias = raw.get("bias", "none")
    if bias != "none":
        raise AdapterError(adapter, f"bias = {bias!r}", "'none'", "Trained base biases are not served.")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            adapter,
            f"init_lora_weights = {init!r}",
            "an initialisation that leaves the base weights as they are",
            "Save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter.",
        )


def _refuse_added_tokens(adapter: str, folder: Path, base_vocab_size: int) -> None:
    path = folder / ADDED_TOKENS_NAME
    if not path.exists():
        return
    new = sorted(token for token, index in _read_json(adapter, path).items() if index >= base_vocab_size)
    if new:
        raise AdapterError(
            adapter,
            f"{len(new)} added tokens ({', '.join(new[:3])} ...)",
            f"no token beyond the base vocabulary of {base_vocab_size}",
            "Added tokens are not served: train without them, or merge the adapter.",
        )


def _positive_int(adapter: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(adapter, f"{key} = {value!r}", "a positive integer", f"Mend {CONFIG_NAME}.")
    return value


def _number(adapter: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(adapter, f"{key} = {value!r}", "a finite number", f"Mend {CONFIG_NAME}.")
    return float(value)


def _strings(adapter: str, raw: dict[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterError(adapter, f"use_bdlora.{key} = {value!r}", "a list of strings", f"Mend {CONFIG_NAME}.")
    return tuple(value)
