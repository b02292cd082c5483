"""LoRA adds no collective: a forward at TP 2 makes the same torch.distributed calls with and without adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blocklora_testing import counting_launcher
from blocklora_testing.case import Case
from blocklora_testing.collectives import environment
from blocklora_testing.models import build_model, random_adapter
from blocklora_testing.server import running

LAYERS = 2


def check_collectives(model: Path, paths: list[str], prompts: list[list[int]], names: list[str], folder: Path) -> None:
    """Serve ``names`` one by one and mixed with the base model; each kind of forward has the calls of one without."""
    log = folder / "collectives.jsonl"
    with running(
        model,
        *("--tp", "2", *paths),
        log=folder / "log",
        environment=environment(log),
        module=(counting_launcher.__file__,),
    ) as server:
        for name in (None, *names):
            server.tokens(prompts[1], name, 4)
        server.many([(prompts[0], name) for name in (None, *names)], 8)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for mode in ("EXTEND", "DECODE"):
        for rank in (0, 1):
            chosen_lines = [line for line in lines if line["mode"] == mode and line["rank"] == rank]
            with_adapters = [line["calls"] for line in chosen_lines if line["adapters"]]
            without = [line["calls"] for line in chosen_lines if not line["adapters"]]
            assert with_adapters, "no forward with adapters was seen"
            assert without, "no forward without adapters was seen"
            assert all(calls == without[0] for calls in with_adapters + without), (mode, rank)
            # embedding, o and down (or experts) of each layer: the counters see the base model's own reductions
            assert without[0]["all_reduce"] >= 1 + 2 * LAYERS


def test_a_forward_makes_the_same_collectives_with_and_without_adapters(case: Any, tmp_path: Path) -> None:
    chosen: Case = case("llama", 2)
    check_collectives(chosen.model, chosen.lora_paths, chosen.prompts, ["plain", "n2", "n3", "n4"], tmp_path)


EXPERTS = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
VOCABULARY = {"r": 4, "target_modules": ["embed_tokens", "lm_head", "down_proj"]}


@pytest.mark.matrix
# PEFT warns that it saves the base model's embeddings too.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize(
    ("family", "targets"), [("qwen3_moe", EXPERTS), ("llama", VOCABULARY)], ids=["experts", "vocabulary"]
)
def test_nor_do_adapters_on_experts_and_vocabulary(family: str, targets: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", family)
    adapter = random_adapter(model, tmp_path / "adapter", **targets)
    prompts = [[3, 1, 4, 1, 5], [*range(23)]]
    check_collectives(model, ["--lora-paths", f"one={adapter}"], prompts, ["one"], tmp_path)
