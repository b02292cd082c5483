"""What ``benchmark/paper/shardings.py`` computes of stock SGLang's slots is what its pool would allocate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.lora.mem_pool import LoRAMemoryPool

from benchmark.paper.shardings import EXPERTS, LLAMA, held_bytes

RANK = 64
MODELS = LLAMA | EXPERTS


def slot_elements(name: str, tp: int) -> int:
    """Elements of one slot of a layer by the pool's own shapes, on a TP rank."""
    base = MODELS[name]
    config = SimpleNamespace(
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        moe_intermediate_size=base.expert_width or None,
        num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads,
        head_dim=base.head_dim,
        num_experts=base.experts or None,
    )
    model = torch.nn.Module()
    model.config = config
    pool = LoRAMemoryPool.__new__(LoRAMemoryPool)
    pool.base_hf_config = config
    pool.max_loras_per_batch = 1
    pool.tp_size = pool.attn_tp_size = pool.moe_tp_size = tp
    pool.experts_shared_outer_loras = pool.moe_use_local_expert_ids = False
    mlp = "_moe" if base.experts else ""
    modules = ("qkv_proj", "o_proj", f"gate_up_proj{mlp}", f"down_proj{mlp}")
    shapes = [
        shape(module, model, RANK, 0) for module in modules for shape in (pool.get_lora_A_shape, pool.get_lora_B_shape)
    ]
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("name", MODELS)
def test_a_slot_is_as_large_as_the_pool_makes_it(name: str, tp: int) -> None:
    base = MODELS[name]
    computed = held_bytes(base, "stock-0.5.23", 8, RANK, tp, torch.bfloat16)
    assert slot_elements(name, tp) * base.layers * torch.bfloat16.itemsize == computed
