"""LoRA adds no collective: a forward at TP 2 makes the same torch.distributed calls with and without adapters."""

from __future__ import annotations

import json
from pathlib import Path

from blocklora_testing import counting_launcher
from blocklora_testing.collectives import environment
from blocklora_testing.server import running


def test_a_forward_makes_the_same_collectives_with_and_without_adapters(case, tmp_path: Path) -> None:
    chosen = case("llama", 2)
    log = tmp_path / "collectives.jsonl"
    with running(
        chosen.model,
        *("--tp", "2", *chosen.lora_paths),
        log=tmp_path / "log",
        environment=environment(log),
        module=(counting_launcher.__file__,),
    ) as server:
        for name in (None, "plain", "n2", "n3"):
            server.tokens(chosen.prompts[1], name, 4)
        server.many([(chosen.prompts[0], name) for name in (None, "n2", "plain", "n4")], 8)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    layers = 2
    for mode in ("EXTEND", "DECODE"):
        for rank in (0, 1):
            chosen_lines = [line for line in lines if line["mode"] == mode and line["rank"] == rank]
            with_adapters = [line["calls"] for line in chosen_lines if line["adapters"]]
            without = [line["calls"] for line in chosen_lines if not line["adapters"]]
            assert with_adapters, "no forward with adapters was seen"
            assert without, "no forward without adapters was seen"
            assert all(calls == without[0] for calls in with_adapters + without), (mode, rank)
            # embedding, o and down of each layer: the counters see the base model's own reductions
            assert without[0]["all_reduce"] >= 1 + 2 * layers
