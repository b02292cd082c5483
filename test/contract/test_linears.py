"""The tools' linears of a TP rank are those of SGLang's real models, family by family."""

from __future__ import annotations

import pkgutil
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocklora_testing.architectures.ranks import build, tp_rank
from blocklora_testing.architectures.tiny import config_of
from blocklora_testing.models import CONFIGS, family_config
from sglang_blocklora.sharding.architectures import ARCHITECTURES, MODULES
from sglang_blocklora.tools.base_model import BaseSizes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model import linear as adapted
    from blocklora_patches.model.experts import adaptable_experts
    from blocklora_patches.model.linears import adaptable_linears, build_spec
    from blocklora_patches.model.vocabulary import adaptable_vocabulary
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
    from sglang.srt.models import (
        apertus,
        arcee,
        commandr,
        deepseek_v2,
        gemma,
        gemma2,
        gemma3_causal,
        glm4,
        glm4_moe_lite,
        granite,
        llama,
        ministral3,
        mistral,
        mixtral,
        olmo2,
        qwen2,
        qwen3,
        qwen3_moe,
        stablelm,
    )

FAMILIES = {
    "llama": llama.LlamaForCausalLM,
    "mistral": mistral.MistralForCausalLM,
    "qwen2": qwen2.Qwen2ForCausalLM,
    "qwen3": qwen3.Qwen3ForCausalLM,
    "gemma2": gemma2.Gemma2ForCausalLM,
    "phi3": llama.Phi3ForCausalLM,
}
# By transformers' model type, at the sizes of ``config_of``; some have experts, or layers of which some have.
OTHERS = {
    "gemma": gemma.GemmaForCausalLM,
    "granite": granite.GraniteForCausalLM,
    "olmo2": olmo2.Olmo2ForCausalLM,
    "glm4": glm4.Glm4ForCausalLM,
    "stablelm": stablelm.StableLmForCausalLM,
    "cohere": commandr.CohereForCausalLM,
    "cohere2": commandr.Cohere2ForCausalLM,
    "gemma3_text": gemma3_causal.Gemma3ForCausalLM,
    "ministral3": ministral3.Ministral3ForCausalLM,
    "arcee": arcee.ArceeForCausalLM,
    "apertus": apertus.ApertusForCausalLM,
    "qwen3_moe": qwen3_moe.Qwen3MoeForCausalLM,
    "mixtral": mixtral.MixtralForCausalLM,
    "deepseek_v2": deepseek_v2.DeepseekV2ForCausalLM,
    "deepseek_v3": deepseek_v2.DeepseekV3ForCausalLM,
    "glm4_moe_lite": glm4_moe_lite.Glm4MoeLiteForCausalLM,
}
LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336}
SMALL = {"heads": 12, "kv_heads": 2, "head_dim": 24, "hidden_size": 288, "intermediate_size": 192}
ODD = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536}  # SmolLM2-135M


VOCAB = 2875  # SGLang pads it to 2880, or for TP 6 and 16 to more


def sglang_model(family: str, config: Any) -> torch.nn.Module:
    config.vocab_size = VOCAB
    # Apertus of SGLang 0.5.21 reads a parameter of its activation as it is built; the others are small too.
    return build((FAMILIES | OTHERS)[family], config, "cpu" if family in OTHERS else "meta")


def as_read(family: str, config: Any, rank: int, size: int, targets: set[str]) -> Any:
    with tp_rank(rank, size):
        model = sglang_model(family, config)
        linears = adaptable_linears(model)
        experts, _ = adaptable_experts(model, linears, uses_triton=False)
        vocabulary, _ = adaptable_vocabulary(model, linears)
        return build_spec(linears, experts, vocabulary, config, targets, torch.bfloat16, rank, size)


def base_sizes(config: Any) -> BaseSizes:
    architectures = [(FAMILIES | OTHERS)[config.model_type].__name__]
    return BaseSizes.of(config.to_dict() | {"vocab_size": VOCAB, "architectures": architectures})


def test_every_architecture_of_the_table_is_tried() -> None:
    assert sorted(one.__name__ for one in (FAMILIES | OTHERS).values()) == sorted(ARCHITECTURES)
    assert FAMILIES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("family", OTHERS)
def test_the_tools_know_which_layers_have_experts(family: str, size: int) -> None:
    config = config_of(family)
    base = base_sizes(config)
    for rank in range(size):
        found = as_read(family, config, rank, size, {"all"})
        assert found == base.spec(torch.bfloat16, rank, size)
        # Attention, its parts of embeddings and head, and the MLP's two linears or two of each expert.
        parts = (3 if base.latents else 2) + (2 if base.splits_vocabulary else 0)
        mlps = [2 * base.experts if layer in base.expert_layers else 2 for layer in range(base.layers)]
        assert [len(layer) for layer in found.layers] == [parts + mlp for mlp in mlps]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tools_linears_are_sglangs(family: str) -> None:
    """Every TP rank, KV heads dealt out and replicated, as on a GPU."""
    for sizes, tp_sizes in ((SMALL, (1, 2, 4, 6)), (LLAMA_8B, (8, 16)), (ODD, (3,))):
        config = family_config(family, **sizes)
        base = base_sizes(config)
        for size in tp_sizes:
            assert base.engine_for(size) == "gpu"
            for rank in range(size):
                assert as_read(family, config, rank, size, {"all"}) == base.spec(torch.bfloat16, rank, size)


@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
def test_the_tools_linears_are_those_of_the_cpu_engine(sizes: dict[str, int], size: int) -> None:
    """It pads heads and the intermediate width until they divide; upstream's own function does it here."""
    config = family_config("llama", **sizes)
    base = base_sizes(config)
    config.architectures = ["LlamaForCausalLM"]
    model_config = SimpleNamespace(
        hf_config=config,
        hf_text_config=config,
        num_attention_heads=config.num_attention_heads,
        get_total_num_kv_heads=lambda: base.kv_heads,
        hidden_size=config.hidden_size,
        quantization=None,
        model_impl="auto",
    )
    adjust_config_with_unaligned_cpu_tp(model_config, SimpleNamespace(), size)
    for rank in range(size):
        found = as_read("llama", config, rank, size, {"all"})
        axes = base.axes(rank, size, "cpu")
        for linear in found.layers[0][:4]:
            entry = MODULES[linear.name.rpartition(".")[2]]
            assert linear.inputs == axes[entry.inputs]
            assert linear.outputs == tuple(axes[axis] for axis in entry.parts.values())
        if base.engine_for(size) == "cpu":
            assert found == base.spec(torch.bfloat16, rank, size)


def test_what_the_server_was_told_to_leave_out_is_known() -> None:
    config = family_config("llama", layers=1)
    found = as_read("llama", config, 1, 2, {"q_proj", "o_proj"})
    kept = {module for linear in found.layers[0] for module in linear.sources}
    assert kept == {f"model.layers.0.self_attn.{name}" for name in ("q_proj", "o_proj")}
    assert found.left_out == {
        *(f"model.layers.0.self_attn.{name}" for name in ("k_proj", "v_proj", "qkv_proj")),
        *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj", "gate_up_proj")),
        *("model.embed_tokens", "lm_head"),
    }


def test_a_layer_that_is_cut_in_another_way_stops_the_server() -> None:
    """A release that renames or cuts linears otherwise must not be served by guess."""
    config = family_config("llama", layers=1)
    with tp_rank(0, 1):
        model = sglang_model("llama", config)
        model.model.layers[0].mlp.down_proj.input_size_per_partition //= 2
        with pytest.raises(ValueError, match=r"cuts intermediate of model\.layers\.0 in another way"):
            build_spec(adaptable_linears(model), {}, None, config, {"all"}, torch.bfloat16, 0, 1)
        del model.model.layers[0].self_attn.o_proj
        with pytest.raises(ValueError, match=r"no attention of self_attn\.qkv_proj, self_attn\.o_proj"):
            adaptable_linears(model)


@pytest.mark.parametrize("hook", adapted.HOOKS, ids=lambda hook: hook.target)
def test_no_kernel_computes_an_adapted_linear_past_its_quant_method(hook: Any) -> None:
    """Upstream's ``DualGemm`` looks at the quant method when a model is built, and never again."""
    owner, _, name = hook.target.rpartition(".")
    kernel = object.__new__(pkgutil.resolve_name(owner))
    vars(kernel).update(mode="unquantised", max_tokens=16, tp_size=1)
    original, base = getattr(type(kernel), name), UnquantizedLinearMethod()
    tokens, plain = torch.zeros(1, 8), SimpleNamespace(quant_method=base)
    joined = SimpleNamespace(quant_method=adapted.AdaptedLinearMethod(base, None, 0, 0))
    assert original(kernel, tokens, joined), "it would be left out"
    assert hook.handler(original, kernel, tokens, plain)
    assert not hook.handler(original, kernel, tokens, joined)


def test_a_kernel_of_few_tokens_lets_adapted_linears_compute_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's for latents reads the weights directly, for up to 16 tokens, and asks ``set_lora`` before."""
    fused_a_gemm = pkgutil.resolve_name("sglang.kernels.ops.gemm.fused_a_gemm")
    monkeypatch.setattr(fused_a_gemm, "dsv3_fused_a_gemm", lambda *_, **__: "past its quant method")

    class Latents(torch.nn.Module):
        weight, quant_method = torch.zeros(8, 8), UnquantizedLinearMethod()

        def forward(self, x: torch.Tensor) -> tuple[str, None]:
            return "computed", None

    layer, tokens = Latents(), torch.zeros(1, 8)
    assert fused_a_gemm.linear_with_fused_a_gemm(layer, tokens) == "past its quant method"
    adapted.adapt_linear(layer, None, 0, 0)
    assert fused_a_gemm.linear_with_fused_a_gemm(layer, tokens) == "computed"
    assert isinstance(layer.quant_method, adapted.AdaptedLinearMethod)


class Method(UnquantizedLinearMethod):
    """A quant method of a later release, with one more way to compute a linear."""

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        layer.restored = True

    def apply_another_way(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_upstream_asks_of_a_quant_method_is_the_own_ones_answer() -> None:
    layer = torch.nn.Module()
    adapted.AdaptedLinearMethod(Method(), None, 0, 0).restore_weights_before_loading(layer)
    assert layer.restored, "the base class's own does nothing, and was called in its place"


@pytest.mark.parametrize("name", ["apply_with_addend", "apply_another_way"])
def test_no_way_to_compute_a_linear_leaves_out_the_deltas(name: str) -> None:
    """Upstream asks whether there is one, and calls ``apply`` where there is not."""
    joined = adapted.AdaptedLinearMethod(Method(), None, 0, 0)
    assert hasattr(Method(), name)
    assert not hasattr(joined, name)
    assert joined.apply_into == joined._apply_into
