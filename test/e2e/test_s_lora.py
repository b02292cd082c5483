"""The benchmarks' S-LoRA sharding on real ranks: tokens equal PEFT's, and exactly the collectives it is known for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from blocklora_testing.case import NEW_TOKENS
from blocklora_testing.collectives import environment
from blocklora_testing.server import running

from benchmark.paper.counts import OURS
from benchmark.record import REPOSITORY

LAYERS = 2
# One all-gather for q, k and v, one for gate and up; one all-reduce each for o and down: section 6 of the S-LoRA paper.
PER_LAYER = Counter(all_gather_single=2, all_reduce=2)
PER_FORWARD = Counter({name: LAYERS * count for name, count in PER_LAYER.items()})
# What is plain in these adapters: block-diagonal ones never need a collective, whatever else is in the batch.
PLAIN = {"plain"}


# 3 divides no LoRA rank here that 2 divides; at 4 SGLang's CPU engine pads the 2 KV heads.
@pytest.mark.matrix  # of a benchmark; test/unit/test_s_lora.py has its law
@pytest.mark.parametrize(("kv_heads", "tp"), [(2, 2), (6, 3), (2, 4)])
def test_tokens_and_collectives(case, tmp_path: Path, kv_heads: int, tp: int) -> None:
    chosen = case("llama", kv_heads)
    log = tmp_path / "collectives.jsonl"
    paths = environment(log)
    paths["PYTHONPATH"] += f":{REPOSITORY}"
    with running(
        chosen.model,
        *("--tp", str(tp), *chosen.lora_paths),
        log=tmp_path / "log",
        environment=paths,
        module=(OURS,),
    ) as server:
        for name in (None, "n2", "plain"):
            assert server.tokens(chosen.prompts[1], name, NEW_TOKENS) == chosen.expected[name][1], name
        assert server.many(chosen.requests(), NEW_TOKENS) == chosen.answers()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for mode in ("EXTEND", "DECODE"):
        for rank in range(tp):
            own = [line for line in lines if line["mode"] == mode and line["rank"] == rank]
            base = Counter(next(line["calls"] for line in own if not line["adapters"]))
            for line in own:
                expected = base + PER_FORWARD if PLAIN & set(line["names"]) else base
                assert Counter(line["calls"]) == expected, (mode, rank, line["names"])
            assert any(set(line["names"]) > PLAIN for line in own), "no mixed batch was seen"
            assert any(line["names"] == ["n2"] for line in own), "no block-diagonal batch was seen"
