"""Reads PEFT's ``adapter_config.json``, and refuses what cannot be served."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sglang_blocklora.adapters.errors import AdapterError, brief, listed
from sglang_blocklora.adapters.files import read_json
from sglang_blocklora.adapters.patterns import MAX_CHARACTERS, Pattern, compile_pattern
from sglang_blocklora.adapters.peft_keys import check_keys
from sglang_blocklora.adapters.targets import Targets
from sglang_blocklora.sharding.cut import Structure

CONFIG_NAME = "adapter_config.json"
MAX_TOKEN_ID = 2**31
BD_KEYS = ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The part of ``adapter_config.json`` that decides an adapter's mathematics (names and meaning as in PEFT).

    invocation    token ids from whose last occurrence in a prompt on the adapter is active; empty: always
    ties_weights  whether PEFT puts on both of tied embeddings and head what it trains on one
    unused        keys that are set and change nothing, each with the reason
    Modules are named as in the model that was trained.
    """

    rank: int
    alpha: float
    rank_pattern: Sequence[tuple[Pattern, int]]
    alpha_pattern: Sequence[tuple[Pattern, float]]
    use_rslora: bool
    nblocks: int
    block_a_patterns: Sequence[str]
    block_b_patterns: Sequence[str]
    match_strict: bool
    block_diagonal: bool
    ties_weights: bool
    targets: Targets
    invocation: Sequence[int]
    unused: Sequence[str]

    def rank_of(self, module: str) -> int:
        """Full LoRA rank of ``module`` (a module path): ``rank_pattern``, else ``r``."""
        return _match_pattern(self.rank_pattern, module.partition("[")[0], self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora; r is the module's full rank, never a block's."""
        rank = self.rank_of(module)
        alpha = _match_pattern(self.alpha_pattern, module.partition("[")[0], self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def structure_of(self, adapter: str, module: str) -> Structure:
        """Which factor of ``module`` is packed block-diagonal. PEFT tests patterns as substrings of the full name."""
        if not self.block_diagonal or module.endswith("]"):
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


def _match_pattern(patterns: Sequence[tuple[Pattern, T]], module: str, default: T) -> T:
    """PEFT's rule: the first key that matches the name or what follows one of its dots."""
    return next((value for pattern, value in patterns if pattern.matches(module)), default)


def read_config(adapter: str, folder: Path) -> AdapterConfig:
    """Read and check ``folder/adapter_config.json``. Raises ``AdapterError``."""
    path = folder / CONFIG_NAME
    raw = read_json(adapter, path)
    if raw is None:
        raise AdapterError(
            adapter,
            f"no {path}",
            "a PEFT adapter folder",
            "Give the folder that holds adapter_config.json and adapter_model.safetensors.",
        )
    return parse_config(adapter, raw)


def parse_config(adapter: str, raw: Mapping[str, Any]) -> AdapterConfig:
    """Check the contents of ``adapter_config.json``. Raises ``AdapterError``."""
    unused = check_keys(adapter, raw)
    bd = raw.get("use_bdlora")
    if bd is None or bd is False:
        bd = {}
    if not isinstance(bd, dict):
        raise _wrong(adapter, "use_bdlora", bd, "an object or null")
    unknown = [brief(key) for key in bd if key not in BD_KEYS and bd[key]]
    if unknown:
        raise _wrong(adapter, "use_bdlora", bd, f"no {listed(unknown)}, which may change what the adapter computes")
    return AdapterConfig(
        rank=_positive_int(adapter, "r", raw.get("r")),
        alpha=_number(adapter, "lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern=_patterns(adapter, raw, "rank_pattern", _positive_int),
        alpha_pattern=_patterns(adapter, raw, "alpha_pattern", _number),
        use_rslora=_flag(adapter, "use_rslora", raw.get("use_rslora"), default=False),
        nblocks=_positive_int(adapter, "use_bdlora.nblocks", bd.get("nblocks", 1)),
        block_a_patterns=_strings(adapter, bd, "target_modules_bd_a"),
        block_b_patterns=_strings(adapter, bd, "target_modules_bd_b"),
        match_strict=_flag(adapter, "use_bdlora.match_strict", bd.get("match_strict"), default=True),
        block_diagonal=bool(bd),
        ties_weights=_flag(adapter, "ensure_weight_tying", raw.get("ensure_weight_tying"), default=False),
        targets=Targets.read(adapter, raw),
        invocation=_token_ids(adapter, raw, "alora_invocation_tokens"),
        unused=unused,
    )


def _patterns(
    adapter: str, raw: Mapping[str, Any], key: str, read: Callable[[str, str, Any], T]
) -> list[tuple[Pattern, T]]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _wrong(adapter, key, value, "an object")
    patterns = [
        (compile_pattern(adapter, key, pattern, tail=True), read(adapter, f"{key}[{brief(pattern)}]", one))
        for pattern, one in value.items()
    ]
    if sum(pattern.cost for pattern, _ in patterns) > MAX_CHARACTERS:
        most = f"regular expressions of at most {MAX_CHARACTERS} characters together (plain names do not count)"
        raise AdapterError(adapter, f"longer ones in {key}", most, f"Mend {CONFIG_NAME}.")
    return patterns


def _positive_int(adapter: str, key: str, value: Any) -> int:
    """A whole number above 0; some tools write it as 8.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(adapter, key, value, "a positive integer")
    return value


def _number(adapter: str, key: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(adapter, key, value, "a finite number")
    return number


def _flag(adapter: str, key: str, value: Any, *, default: bool) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(adapter, key, value, "true or false")
    return value


def _strings(adapter: str, raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(adapter, f"use_bdlora.{key}", value, "a list of strings")
    return tuple(value)


def _token_ids(adapter: str, raw: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = raw.get(key) or []
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < MAX_TOKEN_ID for one in value):
        raise _wrong(adapter, key, value, "a list of token ids, as the base model's tokenizer makes of the invocation")
    return tuple(value)


def _wrong(adapter: str, key: str, value: Any, expected: str) -> AdapterError:
    return AdapterError(adapter, f"{key} = {brief(value)}", expected, f"Mend {CONFIG_NAME}.")
