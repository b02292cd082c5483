"""The check of architectures that were not compared: it takes what is right, and finds each fault that is planted.

The models are SGLang's own, with their own loaders, as each TP rank builds them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from blocklora_testing.architectures.ranks import build, tp_rank
from blocklora_testing.architectures.tiny import config_of
from blocklora_testing.models import family_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model.linear import AdaptedLinearMethod
    from blocklora_patches.model.linears import adaptable_linears, build_spec
    from blocklora_patches.model.self_check import FirstPass, check_linears
    from sglang.srt.models.llama import LlamaForCausalLM, Phi3ForCausalLM
    from sglang.srt.models.olmo2 import Olmo2ForCausalLM
    from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
    from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

Weights = Iterable[tuple[str, torch.Tensor]]
VOCAB = 2880  # divides by every TP size of these tests
SPLIT = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def checked(model: torch.nn.Module, config: Any, rank: int = 0, size: int = 1) -> set[str]:
    """Names of the modules that the check leaves in the first layer; the model's weights are as they were."""
    torch.manual_seed(rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linears = adaptable_linears(model)
    try:
        spec = check_linears(model, linears, build_spec(linears, {}, None, config, {"all"}, torch.bfloat16, rank, size))
    finally:
        after = model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    return {module.rpartition(".")[2] for linear in spec.layers[0] for module in linear.sources}


def small(**sizes: int) -> Any:
    config = family_config("llama", **({"layers": 1} | sizes))
    config.vocab_size = VOCAB
    return config


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("architecture", "model_type", "modules"),
    [
        (LlamaForCausalLM, "llama", SPLIT | {"qkv_proj", "gate_up_proj"}),
        (Phi3ForCausalLM, "phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        (Olmo2ForCausalLM, "olmo2", SPLIT | {"qkv_proj", "gate_up_proj"}),
        (Qwen3MoeForCausalLM, "qwen3_moe", {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"}),
    ],
)
def test_what_was_compared_with_peft_passes(
    architecture: type[torch.nn.Module], model_type: str, modules: set[str], size: int
) -> None:
    """Every TP rank, KV heads dealt out and replicated."""
    config = config_of(model_type)
    config.vocab_size = VOCAB
    for rank in range(size):
        with tp_rank(rank, size):
            found = checked(build(architecture, config, "cpu"), config, rank, size)
        assert found >= modules - {"qkv_proj", "gate_up_proj"} or found >= modules
        assert found <= modules | SPLIT


def test_modules_that_the_server_leaves_out_are_not_asked_for() -> None:
    """``--lora-target-modules``; and a parameter that is not a number, as unused ones may be, is none that changed."""
    config = small()
    with tp_rank(0, 1):
        model = build(LlamaForCausalLM, config, "cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            model.model.norm.weight.fill_(float("nan"))
        linears = adaptable_linears(model)
        spec = check_linears(model, linears, build_spec(linears, {}, None, config, {"q_proj"}, torch.bfloat16, 0, 1))
    assert [sorted(linear.sources) for linear in spec.layers[0]] == [["model.layers.0.self_attn.q_proj"], [], [], []]


def vision_config() -> Any:
    """A tiny Qwen2.5-VL, with the fields that SGLang adds and copies to the top when it reads a config."""
    from transformers import Qwen2_5_VLConfig

    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 288}
    config = Qwen2_5_VLConfig(text_config=small().to_dict() | {"model_type": "qwen2_5_vl_text"}, vision_config=vision)
    for name, value in (config.text_config.to_dict() | {"encoder_only": False, "language_only": False}).items():
        if not hasattr(config, name):
            setattr(config, name, value)
    return config


@pytest.mark.parametrize("size", [1, 2])
def test_of_a_vision_language_model_the_language_part_is_adapted(size: int) -> None:
    """No server of it runs here: its image processor wants torchvision."""
    config = vision_config()
    for rank in range(size):
        with tp_rank(rank, size):
            model = build(Qwen2_5_VLForConditionalGeneration, config, "cpu")
            found = checked(model, config.get_text_config(), rank, size)
        assert found == SPLIT | {"qkv_proj"}
        assert all(path.startswith("model.layers.") for layer in adaptable_linears(model) for path, _ in layer)


def test_towers_that_are_not_told_apart_are_refused() -> None:
    class TwoTowers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = build(LlamaForCausalLM, small(), "cpu").model
            self.vision_tower = build(LlamaForCausalLM, small(), "cpu").model

    with tp_rank(0, 1), pytest.raises(ValueError, match=r"layers in language_model\. and vision_tower\., and does not"):
        adaptable_linears(TwoTowers())


class SwapsKAndV(LlamaForCausalLM):
    """Its ``qkv_proj`` holds V before K."""

    def load_weights(self, weights: Weights) -> None:
        swap = {"k_proj": "v_proj", "v_proj": "k_proj"}
        super().load_weights([(_renamed(name, swap), weight) for name, weight in weights])


class Interleaves(LlamaForCausalLM):
    """Rows of gate and up take turns, as in GPT-OSS."""

    def load_weights(self, weights: Weights) -> None:
        weights = list(weights)
        super().load_weights(weights)
        for name, parameter in self.named_parameters():
            if "gate_up" in name and any("mlp.gate" in one or "mlp.up" in one for one, _ in weights):
                rows = len(parameter)
                parameter.data.copy_(parameter.data.view(2, rows // 2, -1).transpose(0, 1).reshape(rows, -1))


class Scales(LlamaForCausalLM):
    """It folds a constant into one projection."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights([(name, weight * 2 if "o_proj" in name else weight) for name, weight in weights])


class OtherNames(LlamaForCausalLM):
    """Its checkpoints call one projection something else."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights([one for one in weights if "down_proj" not in one[0]])


class Spreads(LlamaForCausalLM):
    """It puts what it loads into a second place."""

    def load_weights(self, weights: Weights) -> None:
        super().load_weights(weights)
        self.lm_head.weight.data[0] += 1


def _renamed(name: str, new: dict[str, str]) -> str:
    return ".".join(new.get(part, part) for part in name.split("."))


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (SwapsKAndV, r"SwapsKAndV was not compared.*layers\.0\.self_attn\.qkv_proj holds the weights of .*k_proj"),
        (Interleaves, r"mlp\.gate_up_proj holds the weights of .*gate_proj in another way"),
        (Scales, r"self_attn\.o_proj holds the weights of .*o_proj in another way"),
        (OtherNames, r"mlp\.down_proj does not take the weights of .*down_proj"),
    ],
)
def test_a_layout_that_is_not_the_tables_is_named(architecture: type[torch.nn.Module], told: str) -> None:
    config = small()
    with tp_rank(0, 1), pytest.raises(ValueError, match=told):
        checked(build(architecture, config, "cpu"), config)


def test_a_loader_that_touches_other_weights_is_refused() -> None:
    config = small()
    with tp_rank(0, 1):
        model = build(Spreads, config, "cpu")
        linears = adaptable_linears(model)
        spec = build_spec(linears, {}, None, config, {"all"}, torch.bfloat16, 0, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        with pytest.raises(ValueError, match="put a probe's weights into other parameters"):
            check_linears(model, linears, spec)


def test_quantised_weights_cannot_be_checked() -> None:
    config = small()
    with tp_rank(0, 1):
        model = build(LlamaForCausalLM, config, "cpu")
        model.model.layers[0].mlp.down_proj.quant_method = object()
        with pytest.raises(ValueError, match=r"mlp\.down_proj is quantised, so its layout cannot be checked"):
            checked(model, config)


class Layer(torch.nn.Module):
    """A decoder layer of two linears that asks for the deltas of those it is told to."""

    def __init__(self, ask: Callable[[], None]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self) -> None:
        self.ask()


class Step:
    """Deltas that are asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        pass

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        self.asked.append((layer, linear))


def passed(asks: Iterable[tuple[int, int]], *, calls_layer: bool = True) -> tuple[FirstPass, Callable[[], None], Step]:
    """A model of one layer with two linears, which asks for the deltas of ``asks``."""
    model, step, tokens = torch.nn.Module(), Step(), torch.zeros(1, 1)
    model.layer = Layer(lambda: [watch.add_delta_(*one, tokens, tokens) for one in asks] and None)
    watch = FirstPass(step, model, [[("layer.self_attn.qkv_proj", None), ("layer.self_attn.o_proj", None)]])

    def run() -> None:
        watch.begin()
        model.layer() if calls_layer else model.layer.forward()

    return watch, run, step


def test_a_pass_that_runs_every_linear_goes_on() -> None:
    _, run, step = passed([(0, 0), (0, 1)])
    for _ in range(3):
        run()
    assert step.asked == [(0, 0), (0, 1)] * 3


def test_a_linear_that_is_computed_past_its_method_stops_the_first_pass() -> None:
    _, run, _ = passed([(0, 0)])
    with pytest.raises(RuntimeError, match=r"1 of its linears \(layer\.self_attn\.o_proj\) are computed past"):
        run()


def test_a_pass_that_cannot_be_seen_stops_the_second() -> None:
    _, run, _ = passed([(0, 0), (0, 1)], calls_layer=False)
    run()
    with pytest.raises(RuntimeError, match="how its decoder layers run cannot be seen"):
        run()


def test_a_linear_that_is_adapted_asks_through_the_watch() -> None:
    watch, _, step = passed([])
    method = AdaptedLinearMethod(torch.nn.Identity(), watch, 0, 1)
    method.base.apply = lambda layer, x, bias: x  # type: ignore[attr-defined]
    method.apply(torch.nn.Module(), torch.zeros(1, 1))
    assert step.asked == [(0, 1)]
