"""How many adapters fit: against arithmetic by hand, and against an arena of that size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blocklora_testing.toy import LLAMA_8B
from sglang_blocklora.memory.static_arena import StaticArena
from sglang_blocklora.tools.__main__ import main
from sglang_blocklora.tools.base_model import BaseSizes
from sglang_blocklora.tools.sizing import GIB, Sizing, bytes_beside_weights, size

PARAMETERS = 8_030_261_248  # Llama-3.1-8B's
PLAIN_16 = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Llama-3.1-8B as files say it: a config, and weights of the right size that hold nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **LLAMA_8B}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * PARAMETERS)
    return tmp_path


def sized(folder: Path, rank: int = 16, nblocks: int = 1, tp: int = 1, **given: Any) -> Sizing:
    options = {"slots": 10_000, "free_bytes": 0, "kv_tokens": 0, "host_bytes": 0} | given
    return size(BaseSizes.read(folder), rank, nblocks, tp, torch.bfloat16, **options)


def test_a_plain_adapter_of_llama_8b_on_one_gpu(folder: Path) -> None:
    """A slot is a token of KV: 32 layers, K and V, 8 heads of 128, 2 bytes. Rank 16 has 42 M parameters, 80 MiB."""
    found = sized(folder, kv_tokens=4_000, host_bytes=8 * GIB)
    assert found.slot_bytes == 32 * 2 * 8 * 128 * 2
    assert PLAIN_16 * 2 <= found.bytes_per_adapter <= PLAIN_16 * 2 * 1.03
    assert found.resident == 6_000 // found.slots_per_adapter
    assert found.in_host_memory == 8 * GIB // (128 * 2**20), "PyTorch pins powers of two"
    assert not found.estimated


def test_slots_of_a_gpu_are_what_its_share_leaves_beside_the_weights(folder: Path) -> None:
    free = bytes_beside_weights(folder, 2, 80 * GIB, 0.85)
    assert free == int(80 * GIB * 0.85) - PARAMETERS
    found = sized(folder, tp=2, slots=None, free_bytes=free)
    assert found.slots == free // (32 * 2 * 4 * 128 * 2)
    assert found.estimated


@pytest.mark.parametrize(("rank", "nblocks", "tp"), [(16, 1, 1), (8, 1, 2), (64, 4, 4)])
def test_an_arena_of_that_size_holds_that_many(folder: Path, rank: int, nblocks: int, tp: int) -> None:
    found = sized(folder, rank, nblocks, tp)
    arena = StaticArena(1, found.slots, 8, torch.bfloat16, torch.device("cpu"))
    for _ in range(found.resident):
        assert arena.allocate(found.slots_per_adapter) is not None
    assert arena.allocate(found.slots_per_adapter) is None


def test_blocks_and_tp_make_room(folder: Path) -> None:
    plain = sized(folder, tp=4, slots=100_000)
    assert sized(folder, nblocks=4, tp=4, slots=100_000).resident > 2 * plain.resident
    assert sized(folder, rank=8, tp=4, slots=100_000).resident >= 2 * plain.resident


def test_latents_share_no_memory_with_adapters(folder: Path) -> None:
    """Their rows hold a latent of 512 and 64 numbers, two planes of it."""
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    assert sized(folder).slot_bytes == 32 * 2 * 576 * 2
    for given in ({"kv_tokens": 1}, {"slots": None}):
        with pytest.raises(ValueError, match=r"--adapter-memory-mb over 73728 bytes"):
            sized(folder, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"nblocks": 3}, "no multiple of nblocks 3"),
        ({"tp": 3}, "TP size 3 does not divide"),
        ({"kv_tokens": 10_000}, "10000 slots of 131072 bytes leave nothing beside 10000 tokens"),
        ({"slots": None, "free_bytes": -5}, "0 slots of 131072 bytes leave nothing beside 0 tokens"),
    ],
)
def test_what_cannot_be_is_told(folder: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sized(folder, **given)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["size", "--base-model", str(folder), "--tp", "2", "--gpu-memory-gb", "80", "--kv-tokens", "400000"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    free = bytes_beside_weights(folder, 2, 80 * GIB, 0.85)
    assert found == sized(folder, tp=2, slots=None, free_bytes=free, kv_tokens=400_000, host_bytes=8 * GIB).__dict__
    assert f"{found['resident']:,} adapters beside 400,000 tokens of KV" in text
    assert "estimated" in text
    (folder / "model.safetensors").unlink()
    assert main(command) == 1
    assert "no *.safetensors" in capsys.readouterr().err
