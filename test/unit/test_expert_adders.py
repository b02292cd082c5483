"""Adapters on experts in a step of the Triton path: eager batches and those of graphs, on both ranks of TP 2."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from blocklora_testing.kernels.in_interpreter import in_interpreter
from blocklora_testing.pools import resident_pool
from safetensors.torch import save_file
from sglang_blocklora.sharding.architectures import Axes, model_spec
from sglang_blocklora.sharding.linears import Interval, ModelSpec

HIDDEN, WIDTH, EXPERTS, CHOICES, LAYER = 32, 32, 4, 2, "model.layers.0"
PARTS = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
# Which experts, and q_proj, each adapter is on.
ADAPTERS = {"all": range(EXPERTS), "some": (1, 3), "attention": ()}


def spec_of(rank: int) -> ModelSpec:
    half = Interval(16 * rank, 16 * rank + 16, 32)
    axes: Axes = {"hidden": Interval(0, HIDDEN, HIDDEN), "query": half, "key_value": half, "expert": half}
    options = {"dtype": torch.float32, "vocab_size": 64, "tp_rank": rank, "tp_size": 2}
    return model_spec({LAYER: axes}, experts={LAYER: EXPERTS}, **options)


def write(folder: Path, experts: tuple[int, ...] | range, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """An adapter's folder; module -> its delta [out, in] in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{LAYER}.self_attn.q_proj": (HIDDEN, 32)}
    shapes |= {f"{LAYER}.mlp.experts.{e}.{part}": shape for e in experts for part, shape in PARTS.items()}
    tensors, deltas = {}, {}
    for module, (inputs, outputs) in shapes.items():
        a, b = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[module] = 2.0 * (b.double() @ a.double())
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", *PARTS]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def check(folder: Path) -> None:
    """Run where the interpreter is on."""
    from sglang_blocklora.batch.triton_adder import TritonAdder

    for rank in (0, 1):
        spec = spec_of(rank)
        places = {name: folder / str(rank) / name for name in ADAPTERS}
        deltas = {
            name: write(places[name], experts, rank=3 + seed, seed=seed)
            for seed, (name, experts) in enumerate(ADAPTERS.items())
        }
        pool = resident_pool(spec, places)
        for name, experts in ADAPTERS.items():
            assert ("expert" in pool.loaded[name].shard.parts) == bool(experts)
        adder = TritonAdder(spec, pool, 16, torch.device("cpu"), max_tokens=8, choices=CHOICES)
        adder.init_graphs("decode", 8)
        adder.prepare_capture("decode", 8)
        batches: list[tuple[list[str | None], list[int] | None, int]] = [
            (["all", None, "some", "attention"], [3, 2, 4, 1], 10),  # more tokens than it was made for
            (["some", None], [2, 1], 3),
            (["all", "some", None, "attention", "all"], None, 8),  # replayed by the graph, whose last rows are padding
            (["attention", None], None, 2),
        ]
        for number, (keys, counts, rows) in enumerate(batches):
            adder.prepare(keys, counts)
            assert adder.joins_experts(0) == any(key in ("all", "some") for key in keys)
            if adder.joins_experts(0):
                per_token = [key for key, n in zip(keys, counts or [1] * len(keys), strict=True) for _ in range(n)]
                check_layer(adder, spec, deltas, per_token + [None] * (rows - len(per_token)), number)


def check_layer(adder, spec: ModelSpec, deltas, per_token: list[str | None], seed: int) -> None:
    """Both linears of the experts that a router chose, against the dense deltas of the rank's rows and columns."""
    generator, pairs = torch.Generator().manual_seed(seed), len(per_token) * CHOICES
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOICES] for _ in per_token]).int()
    width = next(linear for linear in spec.layers[0] if linear.part == "expert").outputs[0]
    own = slice(width.start, width.stop)
    x = torch.randn(len(per_token), HIDDEN, generator=generator)
    hidden = torch.randn(pairs, width.length, generator=generator)
    weights = torch.rand(pairs, generator=generator)
    gate_up, down = torch.randn(pairs, 2 * width.length), torch.randn(pairs, HIDDEN)
    expected = gate_up.double(), down.double()
    for pair, expert in enumerate(ids.flatten().tolist()):
        key = per_token[pair // CHOICES]
        of_expert = deltas.get(key, {})
        module = f"{LAYER}.mlp.experts.{expert}"
        if f"{module}.down_proj" in of_expert:
            token = x[pair // CHOICES].double()
            parts = [of_expert[f"{module}.{part}"][own] @ token for part in ("gate_proj", "up_proj")]
            expected[0][pair] += torch.cat(parts)
            expected[1][pair] += weights[pair] * (of_expert[f"{module}.down_proj"][:, own] @ hidden[pair].double())
    adder.add_to_gate_up_(0, gate_up, x, ids)
    adder.add_to_down_(0, down, hidden, weights)
    for found, wanted in zip((gate_up, down), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-3)


def test_in_the_interpreter(tmp_path: Path) -> None:
    in_interpreter(__file__, tmp_path, "check")
