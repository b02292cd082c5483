"""PEFT's adapters on all experts of a layer: one module for each, cut for every TP rank; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blocklora_testing.models import build_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME, Checkpoint
from sglang_blocklora.adapters.config import CONFIG_NAME, read_config
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.opened import open_adapter
from sglang_blocklora.tools.verify import verify
from transformers import AutoModelForCausalLM

EXPERTS = 8
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WRAPPER = "base_model.model.model.layers.1.mlp.experts"

# PEFT 0.21 looks for patterns among modules only, and applies them to parameters nevertheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("experts") / "model", "qwen3_moe", kv_heads=4)


def made(model: Path, folder: Path, parameters: list[str]) -> PeftModel:
    """A random adapter on ``parameters``, saved by PEFT; ranks differ."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ranks = {"experts.down_proj": 6}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=parameters, rank_pattern=ranks)
    peft_model = get_peft_model(base, config)
    with torch.no_grad():
        for name, one in peft_model.named_parameters():
            if ".lora_" in name:
                one.normal_()
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.mark.parametrize("parameters", [FUSED, FUSED[1:], FUSED[:1]], ids=["both", "down", "gate and up"])
def test_each_experts_delta_is_pefts(model: Path, tmp_path: Path, parameters: list[str]) -> None:
    expected = made(model, tmp_path / "a", parameters)
    wrappers = {
        f"{name.removeprefix('base_model.model.').replace('.base_layer', '')}.{one.parameter_name}": one
        for name, one in expected.named_modules()
        if hasattr(one, "parameter_name")
    }
    assert len(wrappers) == 2 * len(parameters)
    with open_adapter(tmp_path / "a", BaseSizes.read(model)) as adapter:
        found = {module for module in adapter.modules if module.endswith("]")}
        assert found == {f"{name}[{expert}]" for name in wrappers for expert in range(EXPERTS)}
        for name, wrapper in wrappers.items():
            deltas = wrapper.get_delta_weight("default").double()
            for expert in range(EXPERTS):
                module = f"{name}[{expert}]"
                a, b = adapter.dense_factors(module)
                torch.testing.assert_close(
                    adapter.modules[module].scaling * b @ a, deltas[expert], rtol=1e-5, atol=1e-5
                )


def test_the_ranks_parts_recombine(model: Path, tmp_path: Path) -> None:
    """Padded widths too: SGLang's CPU engine rounds an expert's share at TP 2 and 4 up."""
    made(model, tmp_path / "a", FUSED)
    for found in verify(tmp_path / "a", BaseSizes.read(model), [1, 2, 4]):
        assert found.passed, found
        assert found.modules == 2 * (1 + 2 * EXPERTS)


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return write


CASES = {
    "a parameter that is not selected": (config(target_parameters=FUSED[:1]), "weights for 2 of its parameters"),
    "none is selected": (config(target_parameters=None), "as many as target_parameters selects (none)"),
    "parameters as an expression": (config(target_parameters=".*"), "a list of names"),
    "another rank": (config(rank_pattern={"experts.down_proj": 5}), "rank 5 times the number of experts in both"),
    "other numbers of experts": (
        weights(lambda t: t.update({f"{WRAPPER}.lora_A.weight": torch.zeros(42, 96)})),
        "rank 6 times the number of experts in both",
    ),
    "more experts than the model has": (
        weights(
            lambda t: t.update(
                {f"{WRAPPER}.lora_A.weight": torch.zeros(54, 96), f"{WRAPPER}.lora_B.weight": torch.zeros(288, 54)}
            )
        ),
        "It has no such expert",
    ),
    "a claim of endless experts": (
        weights(
            lambda t: t.update(
                {f"{WRAPPER}.lora_A.weight": torch.zeros(60000, 0), f"{WRAPPER}.lora_B.weight": torch.zeros(288, 60000)}
            )
        ),
        "at most 4096",
    ),
    "the other parameter's factors": (
        weights(lambda t: t.update(_swapped(t))),
        "rank 6 times the number of experts",
    ),
    "a name as ours for one expert": (
        weights(lambda t: t.update({f"{WRAPPER}.down_proj[0].lora_{f}.weight": torch.zeros(6, 6) for f in "AB"})),
        "down_proj[0]",
    ),
}


def _swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inner = WRAPPER + ".base_layer"
    names = [(f"{WRAPPER}.lora_{f}.weight", f"{inner}.lora_{f}.weight") for f in "AB"]
    return {a: tensors[b] for a, b in names} | {b: tensors[a] for a, b in names}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message_that_says_why(model: Path, tmp_path: Path, case: str) -> None:
    break_it, told = CASES[case]
    folder, spec = tmp_path / "mine", BaseSizes.read(model).spec(torch.float32, 0, 2)
    made(model, folder, FUSED)
    load_shard("mine", folder, spec, max_rank=64)
    break_it(folder)
    with pytest.raises(AdapterError) as error:
        load_shard("mine", folder, spec, max_rank=64)
    assert str(error.value).startswith("adapter 'mine'")
    assert told in str(error.value)


def test_without_the_base_models_config_the_tools_ask_for_it(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "a", FUSED)
    with pytest.raises(AdapterError, match="Give --base-model"), open_adapter(tmp_path / "a"):
        pass


def test_rows_of_experts_that_take_turns_are_read_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 128 experts, reading them for each would be 128 times the file."""
    made(model, tmp_path / "a", FUSED)
    read: list[str] = []
    with Checkpoint("a", tmp_path / "a", read_config("a", tmp_path / "a")) as checkpoint:
        of_file = checkpoint._file.read

        def counted(name: str, *part: slice | None) -> torch.Tensor:
            read.append(name)
            return of_file(name, *part)

        monkeypatch.setattr(checkpoint._file, "read", counted)
        for expert in range(EXPERTS):
            checkpoint.read(f"model.layers.1.mlp.experts.down_proj[{expert}]", "B", None, None)
    assert read == [f"{WRAPPER}.lora_B.weight"]
