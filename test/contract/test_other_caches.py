"""Caches that docs/features.md says SGLang itself refuses beside a ``--radix-cache-backend``: it still does."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import version
from typing import Any

import pytest
from sglang_blocklora import cpu_only

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    cpu_only.prepare_import()
    from blocklora_patches.model.unsupported import BACKEND_NAME

NOT_THERE = "this release of SGLang has no such check"
CASES = [
    ("mamba_hook.handle_int8_mamba_checkpoint", {"enable_int8_mamba_checkpoint": True}, "0.5.21"),
    ("hicache_hook.handle_hicache", {"enable_unified_cache_external_linker": True}, "0.5.23"),
    (
        "kv_shard_hook.handle_kv_cache_sharding",
        {"enable_kv_cache_sharding": True, "disaggregation_mode": "prefill"},
        "0.5.22",
    ),
]


class Flags:
    """Server arguments that are None but for what is on."""

    def __init__(self, on: dict[str, Any]) -> None:
        vars(self).update(on)

    def __getattr__(self, name: str) -> None:
        return None


@pytest.mark.parametrize(("check", "on", "since"), CASES, ids=[check for check, _, _ in CASES])
def test_upstream_refuses_it_beside_our_cache(
    monkeypatch: pytest.MonkeyPatch, check: str, on: dict[str, Any], since: str
) -> None:
    if version("sglang") < since:
        pytest.skip(NOT_THERE)
    module, _, name = check.partition(".")
    hook = importlib.import_module(f"sglang.srt.arg_groups.{module}")
    monkeypatch.setattr(hook, "resolving_view", lambda flags: flags)
    monkeypatch.setattr(hook, "get_device_memory_capacity", lambda device: 80, raising=False)
    with pytest.raises(ValueError, match=r"--radix-cache-backend|default UnifiedRadixCache"):
        getattr(hook, name)(Flags(on | {"radix_cache_backend": BACKEND_NAME}))
