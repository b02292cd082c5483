"""What the doctor tells of a model: whether it is served, and what an adapter costs on each TP rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from blocklora_testing.findings import told
from blocklora_testing.toy import LLAMA_8B
from sglang_blocklora.doctor import model
from sglang_blocklora.doctor.finding import Asked

MODEL = {"architectures": ["LlamaForCausalLM"], **LLAMA_8B}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return tmp_path


def test_what_an_adapter_costs(folder: Path) -> None:
    """Llama-3.1-8B, plain, rank 16: 40 M parameters (docs/kernels.md), A of column layers whole on each rank."""
    found = told(model.check(Asked(model=str(folder), tp=1)))
    assert found["adapted linears"].found == "qkv_proj, o_proj, gate_up_proj, down_proj of 32 layers"
    parameters = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 32
    slots = found["an adapter of rank 16"].found.split()[0]
    per_slot = 2 * 1024 * 32
    assert parameters <= int(slots) * per_slot <= parameters * 1.03
    assert f"{int(slots) * per_slot * 2 / 2**20:.1f} MiB on each of 1 TP ranks (plain LoRA, bfloat16)" in (
        found["an adapter of rank 16"].found
    )


def test_blocks_and_data_type_count(folder: Path) -> None:
    def mebibytes(**options: Any) -> float:
        found = told(model.check(Asked(model=str(folder), tp=8, rank=16, **options)))["an adapter of rank 16"]
        return float(found.found.split(" slots, ")[1].split()[0])

    assert mebibytes(nblocks=8) < mebibytes() / 4
    assert mebibytes(flags=("--dtype", "float32")) == pytest.approx(2 * mebibytes(), abs=0.2)


@pytest.mark.parametrize(
    ("asked", "what", "part"),
    [
        ({"nblocks": 3}, "an adapter of rank 16", "rank 16 is no multiple of nblocks 3"),
        ({"rank": 48, "nblocks": 3}, "an adapter of rank 48", "is no multiple of nblocks 3"),
        (
            {"flags": ("--adapter-memory", "static", "--adapter-memory-mb", "50")},
            "an adapter of rank 16",
            "the arena has 50 MiB",
        ),
    ],
)
def test_an_adapter_that_cannot_be_served(folder: Path, asked: dict[str, Any], what: str, part: str) -> None:
    found = told(model.check(Asked(model=str(folder), **asked)))[what]
    assert found.result == "fault"
    assert part in found.found


def test_a_tp_size_that_divides_nothing_is_a_fault_on_a_gpu(folder: Path) -> None:
    base = model.BaseSizes.read(folder)
    assert [finding.result for finding in model.cost(base, Asked(tp=3), on_gpu=True)] == ["fault"]
    assert [finding.result for finding in model.cost(base, Asked(tp=3), on_gpu=False)] == ["ok"]
    assert [finding.result for finding in model.cost(base, Asked(tp=4), on_gpu=True)] == ["ok"]


def test_models_that_are_not_served(folder: Path) -> None:
    assert told(model.check(Asked()))["base model"].result == "skipped"
    assert told(model.check(Asked(model=str(folder / "none"))))["base model"].result == "fault"
    (folder / "config.json").write_text(json.dumps(MODEL | {"kv_lora_rank": 512}))  # and no other of its sizes
    found = told(model.check(Asked(model=str(folder))))["base model"]
    assert found.result == "fault"
    assert "qk_rope_head_dim" in found.found


def test_an_architecture_that_was_not_compared_is_told(folder: Path) -> None:
    compared = told(model.check(Asked(model=str(folder))))["adapted linears"]
    (folder / "config.json").write_text(json.dumps(MODEL | {"architectures": ["OlmoForCausalLM"]}))
    other = told(model.check(Asked(model=str(folder))))["adapted linears"]
    assert other.result == compared.result == "ok"
    assert "not compared with PEFT" in other.found
    assert "not compared" not in compared.found
