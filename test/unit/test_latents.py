"""Adapters on multi-head latent attention without a server: what each TP rank holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from blocklora_testing.toy import LLAMA_8B
from safetensors.torch import save_file
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.inspect_adapter import inspect_adapter

SIZES = {"q_lora_rank": 8, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 3, "v_head_dim": 4}
BASE = BaseSizes.of(LLAMA_8B | SIZES | {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1})
# (in, out) of each linear: four heads of 3 + 2 numbers for queries and of 4 for values.
WIDTHS = {"q_a_proj": (24, 8), "q_b_proj": (8, 20), "kv_a_proj_with_mqa": (24, 6), "o_proj": (16, 24)}


def write(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    """A plain adapter of rank 2 on the only layer's linears."""
    tensors = {}
    for module, (inputs, outputs) in modules.items():
        name = f"base_model.model.model.layers.0.self_attn.{module}"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, inputs), f"{name}.lora_B.weight": torch.ones(outputs, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_each_rank_has_the_latents_whole_and_its_heads(tmp_path: Path) -> None:
    (cost,) = inspect_adapter(write(tmp_path, WIDTHS), BASE, [2], torch.float32).tp
    numbers = 2 * ((24 + 8) + (8 + 20 // 2) + (24 + 6) + (16 // 2 + 24))
    assert cost.bytes_per_rank == [4 * numbers] * 2


def test_without_the_base_model_nothing_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="weights on latents"):
        inspect_adapter(write(tmp_path, WIDTHS), None, [2])


def test_what_is_multiplied_into_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="SGLang multiplies kv_b_proj into attention"):
        inspect_adapter(write(tmp_path, WIDTHS | {"kv_b_proj": (4, 28)}), BASE, [2])
