"""Adapters on experts: greedy tokens of a real server, in mixed batches, equal those of PEFT or of merged weights.

PEFT adapts the experts of transformers 5 as parameters (``target_parameters``). One module for each expert is what
older checkpoints hold; their deltas are put into the base model's weights here, in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.latent_attention import change_for
from blocklora_testing.server import running

FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
# What checkpoints of each family call an expert's gate, up and down, as a server has to know them.
NAMES = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "deepseek_v2": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
ATTENTION = ("q_proj", "o_proj")
RANK = 4


def by_hand(family: str, model: Path, folder: Path, nblocks: int) -> Path:
    """A random adapter with a module for each expert, as older checkpoints hold them."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, width = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    path, (gate, up, down) = NAMES[family]
    sizes = {gate: (hidden, width), up: (hidden, width), down: (width, hidden)}
    tensors = {}
    count = next(config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key))
    for layer in range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"]):
        for expert in range(count):
            for part, (inputs, outputs) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.{path}.{expert}.{part}"
                cut = (nblocks, 1) if part == down else (1, nblocks)  # PEFT's packed form: block_a or block_b
                tensors[f"{name}.lora_A.weight"] = torch.empty(RANK, inputs // cut[0])
                tensors[f"{name}.lora_B.weight"] = torch.empty(outputs, RANK // cut[1])
    generator = torch.Generator().manual_seed(len(tensors))
    for _, tensor in sorted(tensors.items()):
        tensor.normal_(std=0.15, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    blocks = {"nblocks": nblocks, "target_modules_bd_a": [down], "target_modules_bd_b": [gate, up]}
    raw: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": [gate, up, down]}
    (folder / "adapter_config.json").write_text(json.dumps(raw | ({"use_bdlora": blocks} if nblocks > 1 else {})))
    return folder


def merged(family: str, model: Path, adapter: Path, nblocks: int) -> Any:
    """transformers' model with the deltas of a ``by_hand`` adapter in its weights."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    path, (gate, up, down) = NAMES[family]
    for i, layer in enumerate(base.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        for expert in range(0 if experts is None else len(experts.down_proj)):
            name = f"base_model.model.model.layers.{i}.{path}.{expert}"
            deltas = {part: _delta(tensors, f"{name}.{part}", nblocks, part == down) for part in (gate, up, down)}
            _add(experts.gate_up_proj.data[expert], torch.cat([deltas[gate], deltas[up]]))
            _add(experts.down_proj.data[expert], deltas[down])
    return base


def _delta(tensors: Mapping[str, torch.Tensor], name: str, nblocks: int, row: bool) -> torch.Tensor:
    a, b = (tensors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
    if row:
        a = torch.block_diag(*a.chunk(nblocks))
    else:
        b = torch.block_diag(*b.chunk(nblocks))
    return 8 / RANK * b @ a


def _add(weight: torch.Tensor, delta: torch.Tensor) -> None:
    weight.copy_((weight.double() + delta).float())


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of a Hugging Face model."""
    from blocklora_testing.models import VOCAB

    def one(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=VOCAB + 1,
        )
        return found[0, len(prompt) :].tolist()

    with torch.inference_mode():
        return [one(prompt) for prompt in prompts]


def make(folder: Path, family: str, kv_heads: int) -> Case:
    """A model with experts, adapters on attention, on experts in each form, and what they must answer."""
    from blocklora_testing.models import VOCAB, build_model, random_adapter
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = build_model(folder / "model", family, kv_heads=kv_heads)
    adapters = {
        "attention": random_adapter(model, folder / "attention", r=4, target_modules=list(ATTENTION)),
        "both": random_adapter(model, folder / "both", r=4, target_modules=["q_proj"], target_parameters=list(FUSED)),
        "down": random_adapter(
            model, folder / "down", r=4, target_parameters=["experts.down_proj"], rank_pattern={"experts.down_proj": 6}
        ),
        "split": by_hand(family, model, folder / "split", 1),
        "blocks": by_hand(family, model, folder / "blocks", 2),
    }
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (5, 23)]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected: dict[str | None, list[list[int]]] = {None: answers(base, prompts)}
    for name in ("attention", "both", "down"):
        fresh = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected[name] = answers(PeftModel.from_pretrained(fresh, adapters[name]).eval(), prompts)
    for name, nblocks in (("split", 1), ("blocks", 2)):
        expected[name] = answers(merged(family, model, adapters[name], nblocks).eval(), prompts)
    assert len({str(tokens) for tokens in expected.values()}) == len(expected), "an adapter that changes nothing"
    return Case(model, adapters, prompts, expected)


MATRIX = [
    pytest.param(family, tp, marks=() if (family, tp) == ("qwen3_moe", 2) else pytest.mark.matrix)
    for family in NAMES
    for tp in (1, 2, 4)
]


# PEFT 0.21 looks for patterns among modules only, and applies them to parameters nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(("family", "tp"), MATRIX)
def test_tokens_of_adapters_on_experts(tmp_path: Path, family: str, tp: int) -> None:
    chosen = make(tmp_path, family, kv_heads=4 if tp == 4 else 2)
    flags = ["--tp", str(tp), "--max-total-tokens", "16384"]
    flags += ["--disable-shared-experts-fusion", *chosen.lora_paths]
    with running(chosen.model, *flags, log=tmp_path / "log", warm=True, change=change_for(family)) as server:
        for warmth in ("cold", "warm prefix cache"):
            found = server.many(chosen.requests(), NEW_TOKENS)
            assert found == chosen.answers(), warmth
