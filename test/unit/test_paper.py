"""The computed side of benchmark/paper: against arithmetic by hand and the paper's own parameter ratios."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmark.paper import counts
from benchmark.paper.shardings import EXPERTS, LLAMA, Sharding, held_bytes, lora_cost, matched_rank, parameters

# Elements a layer and unit of plain rank on one of 8 TP ranks. Stock, 8B: 5 whole A of 4096, B of q, k, v, gate, up
# (4096 + 2 * 1024 + 2 * 14336) / 8, A of o and down (4096 + 14336) / 8, 2 whole B of 4096.
BY_HAND = {
    ("Llama-3.1-8B", "stock"): 35328,
    ("Llama-3.1-8B", "s-lora"): 10240,
    ("Llama-3.1-8B", "block-diagonal"): 8832,
    ("Llama-3.1-70B", "stock"): 70400,
    ("Llama-3.1-70B", "s-lora"): 20224,
    ("Llama-3.1-70B", "block-diagonal"): 17600,
}


@pytest.mark.parametrize(("model", "sharding"), BY_HAND)
def test_bytes_flops_and_collectives_at_tp_8(model: str, sharding: Sharding) -> None:
    base, batch = LLAMA[model], 3
    rank = 128 if sharding == "block-diagonal" else 64
    cost = lora_cost(base, sharding, rank, 8, batch, torch.bfloat16)
    elements = BY_HAND[model, sharding] * 64 * base.layers
    assert cost.adapter_bytes == cost.read_bytes == 2 * elements
    assert cost.flops == 2 * elements * batch
    assert cost.all_gathers == (2 * base.layers if sharding == "s-lora" else 0)
    assert cost.all_reduces == (0 if sharding == "block-diagonal" else 2 * base.layers)
    # q, k, v, gate and up gather 64 / 8 numbers a token each; o and down reduce 64
    assert cost.gather_input_bytes == (2 * base.layers * batch * 5 * 8 if sharding == "s-lora" else 0)
    assert cost.reduce_input_bytes == (0 if sharding == "block-diagonal" else 2 * base.layers * batch * 2 * 64)
    assert cost.sent_bytes == 7 * cost.gather_input_bytes + 2 * 7 * cost.reduce_input_bytes // 8


# Mixtral on one of 8 TP ranks, a layer and unit of rank: attention (q, k, v, o), one expert (gate, up, down).
MIXTRAL_BY_HAND = {
    "stock-0.5.23": (3 * 4096 + (4096 + 2 * 1024) // 8 + 4096 // 8 + 4096, 2 * 4096 + 3 * 14336 // 8 + 4096),
    "vllm-sharded": ((3 * 4096 + 4096 + 2 * 1024 + 4096 + 4096) // 8, 3 * (4096 + 14336) // 8),
}


@pytest.mark.parametrize("sharding", MIXTRAL_BY_HAND)
def test_of_experts_all_are_held_and_two_are_read(sharding: Sharding) -> None:
    base, rank = EXPERTS["Mixtral-8x7B"], 16
    cost = lora_cost(base, sharding, rank, 8, 3, torch.bfloat16)
    attention, expert = (32 * rank * elements for elements in MIXTRAL_BY_HAND[sharding])
    assert cost.adapter_bytes == 2 * (attention + 8 * expert)
    assert cost.read_bytes == 2 * (attention + 2 * expert)
    assert cost.flops == 2 * 3 * (attention + 2 * expert)
    split = sharding == "vllm-sharded"
    assert (cost.all_gathers, cost.all_reduces) == ((64, 64) if split else (0, 0))
    # float32 of q, k, v and o; bfloat16 of gate and up, and of down, for each of two experts
    assert cost.gather_input_bytes == (32 * 3 * (3 * 2 * 4 + 2 * 2 * 2 * 2) if split else 0)
    assert cost.reduce_input_bytes == (32 * 3 * (16 * 4 + 2 * 16 * 2) if split else 0)


def test_a_slot_is_sized_for_the_largest_rank_and_rows_for_the_adapter() -> None:
    base = LLAMA["Llama-3.1-8B"]
    needed = lora_cost(base, "vllm", 8, 8, 1, torch.bfloat16).adapter_bytes
    assert held_bytes(base, "vllm", 8, 256, 8, torch.bfloat16) == 32 * needed
    assert held_bytes(base, "plain", 8, 256, 8, torch.bfloat16) == pytest.approx(needed, rel=0.03)
    assert held_bytes(base, "s-lora", 8, 256, 8, torch.bfloat16) == pytest.approx(needed * 10240 / 35328)


@pytest.mark.parametrize(
    ("model", "multiple", "published"),
    [("Llama-3.1-70B", 2, 0.87), ("Llama-3.1-70B", 4, 1.74), ("Llama-3.1-8B", 2, 0.86), ("Llama-3.1-8B", 4, 1.73)],
)
def test_parameters_over_plain_are_the_papers(model: str, multiple: int, published: float) -> None:
    base = LLAMA[model]
    assert parameters(base, multiple * 64, 8) / parameters(base, 64) == pytest.approx(published, abs=0.006)
    assert parameters(base, matched_rank(base, 64, 8), 8) <= parameters(base, 64)


def line(rank: int, names: list[str], flops: int, **calls: int) -> dict:
    put_in = {name: 8 * number for name, number in calls.items()}
    return {"rank": rank, "names": names, "calls": calls, "input_bytes": put_in, "flops": flops}


def forwards(gathers: int) -> list[dict]:
    """Three decode forwards of the base model and three with an adapter on two TP ranks."""
    base = [line(rank, [], 100, all_reduce=5) for rank in (0, 1)] * 3
    return base + [line(rank, ["a"], 130, all_reduce=7, all_gather_single=gathers) for rank in (0, 1)] * 3


def test_counts_are_differences_to_the_base_model() -> None:
    cost = counts.count(forwards(4), "a", forwards(4), 2)
    assert (cost.all_gathers, cost.all_reduces) == (4, 2)
    assert (cost.gather_input_bytes, cost.reduce_input_bytes, cost.sent_bytes) == (32, 16, 32 + 16)
    assert cost.flops == 30
    idle = counts.count(forwards(4), None, forwards(4), 2)
    assert dataclasses.astuple(idle) == (0,) * 8


@pytest.mark.parametrize(
    "change",
    [
        {"calls": {"all_reduce": 8, "all_gather_single": 4}},
        {"calls": {"all_reduce": 7, "all_gather_single": 4, "broadcast": 1}},
        {"input_bytes": {"all_reduce": 64, "all_gather_single": 32}},
    ],
)
def test_ranks_and_forwards_that_differ_stop_the_count(change: dict) -> None:
    lines = json.loads(json.dumps(forwards(4)))
    lines[-1] |= change
    with pytest.raises(SystemExit):
        counts.count(lines, "a", forwards(4), 2)


def test_decode_forwards_of_one_request_are_chosen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    kinds = [("EXTEND", 1), ("DECODE", 2), ("DECODE", 1)]
    log.write_text("".join(json.dumps({"mode": mode, "tokens": tokens}) + "\n" for mode, tokens in kinds))
    assert counts.decode_lines(log) == [{"mode": "DECODE", "tokens": 1}]
