"""Why no adapter can be on a model's experts: read off SGLang's own modules, each reason on its own."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from blocklora_testing.architectures.ranks import build, tp_rank
from blocklora_testing.architectures.tiny import config_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model.experts import adaptable_experts
    from blocklora_patches.model.linears import adaptable_linears
    from sglang.srt.models import deepseek_v2, qwen3_moe


def reason(model: torch.nn.Module) -> str | None:
    found, why = adaptable_experts(model, adaptable_linears(model), uses_triton=False)
    assert bool(found) == (why is None)
    return why


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with tp_rank(0, 1):
        return build(qwen3_moe.Qwen3MoeForCausalLM, config_of("qwen3_moe"), "cpu")


@pytest.mark.parametrize(
    ("where", "name", "value", "told"),
    [
        ("", "quant_method", torch.nn.Identity(), "their weights are quantised (Identity)"),
        ("", "moe_ep_size", 2, "each rank of --ep-size holds only some of them"),
        ("", "num_fused_shared_experts", 1, "shared experts are fused with them"),
        ("", "w13_weight_bias", torch.zeros(1), "they have biases"),
        ("moe_runner_config", "activation", "relu2", "their activation is another"),
        ("moe_runner_config", "gemm1_alpha", 1.7, "their activation is another"),
        ("moe_runner_config", "apply_router_weight_on_input", True, "the router's weights are applied to their inputs"),
        ("moe_runner_config", "routed_scaling_factor", 2.5, "what they put out is scaled"),
    ],
)
def test_each_reason(model: torch.nn.Module, where: str, name: str, value: Any, told: str) -> None:
    experts = model.model.layers[0].mlp.experts
    assert reason(model) is None
    changed = getattr(experts, where) if where else experts
    with mock.patch.object(changed, name, value, create=not hasattr(changed, name)):
        assert told in str(reason(model))
    assert reason(model) is None


def test_a_sum_that_a_config_scales_is_found() -> None:
    """DeepSeek-V3's; experts of DeepSeek-V2-Lite are added up as they are."""
    with tp_rank(0, 1):
        assert "scaled" in str(reason(build(deepseek_v2.DeepseekV3ForCausalLM, config_of("deepseek_v3"), "cpu")))
        assert reason(build(deepseek_v2.DeepseekV2ForCausalLM, config_of("deepseek_v2"), "cpu")) is None
