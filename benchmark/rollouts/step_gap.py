"""How long others' tokens wait while adapters are updated, on a server of SmolLM2 at TP 2.

    python -m benchmark.rollouts.step_gap

Streams of the base model run, half of the rounds beside updates of a rank 32 adapter, one straight after the other, by
PUT. What counts is the time between a stream's tokens: at the median, and at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import torch
from blocklora_testing import smollm2
from blocklora_testing.server import running
from safetensors.torch import save

from benchmark.record import Recorder

RANK = 32
LAYERS, HIDDEN, INTERMEDIATE, QUERY, KEY_VALUE = 30, 576, 1536, 12 * 64, 4 * 64
FEATURES = {
    "self_attn.q_proj": (HIDDEN, QUERY),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (QUERY, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
TOKENS = 160
STREAMS = 2


def adapter(seed: int) -> bytes:
    """Random weights of all linears, in float32 as the server computes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer, (module, (inputs, outputs)) in itertools.product(range(LAYERS), FEATURES.items()):
        name = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(outputs, RANK)
    modules = [module.split(".")[1] for module in FEATURES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    return save(tensors, {"adapter_config": json.dumps(config)})


def gaps(client: httpx.Client, into: list[float]) -> None:
    """Seconds between the tokens of one stream."""
    body = {
        "input_ids": list(range(100, 132)),
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True},
    }
    arrivals = []
    with client.stream("POST", "/generate", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic())
    into += [later - earlier for earlier, later in itertools.pairwise(arrivals)]


def measure(client: httpx.Client, contents: Sequence[bytes]) -> tuple[dict[str, float], int]:
    """Figures of some streams at once; ``contents`` are sent in turn meanwhile."""
    found: list[float] = []
    streams = [threading.Thread(target=gaps, args=(client, found)) for _ in range(STREAMS)]
    for stream in streams:
        stream.start()
    seconds = []
    for data in itertools.cycle(contents):
        if not any(stream.is_alive() for stream in streams):
            break
        began = time.monotonic()
        answer = client.put("/adapters/changing", content=data)
        answer.raise_for_status()
        seconds.append(time.monotonic() - began)
    for stream in streams:
        stream.join()
    figures = {"median_gap_ms": statistics.median(found) * 1e3, "longest_gap_ms": max(found) * 1e3}
    figures["p99_gap_ms"] = statistics.quantiles(found, n=100)[98] * 1e3
    if seconds:
        figures["update_ms"] = statistics.median(seconds) * 1e3
    return figures, len(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    contents = [adapter(seed) for seed in range(2)]
    size_mib = len(contents[0]) / 2**20
    settings = {"model": smollm2.MODEL_NAME, "LoRA rank": RANK, "adapter MiB": round(size_mib), "TP": 2}
    recorder = Recorder("step_gap", 0, settings)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(smollm2.build(), "--tp", "2", "--served-model-name", "base", log=Path(folder) / "log") as server,
        httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client,
    ):
        measure(client, ())  # warm
        for round_ in range(arguments.rounds):
            order = ("quiet", "updates") if round_ % 2 == 0 else ("updates", "quiet")
            for variant in order:
                figures, updates = measure(client, contents if variant == "updates" else ())
                recorder.add("streams", variant, round_, figures | {"updates": updates})
                told = {name: round(value, 1) for name, value in figures.items()}
                print(f"{variant:8} {updates:4} updates {told}", flush=True)
    recorder.finish()


if __name__ == "__main__":
    main()
