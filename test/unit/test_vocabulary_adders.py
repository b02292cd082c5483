"""Adapters on embeddings and head in a step, on the torch path and the Triton path, on both ranks of TP 2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blocklora_testing.kernels.in_interpreter import in_interpreter
from blocklora_testing.pools import resident_pool
from safetensors.torch import save_file
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.memory.static_pool import StaticPool
from sglang_blocklora.sharding.architectures import Axes, model_spec
from sglang_blocklora.sharding.linears import Interval, ModelSpec
from sglang_blocklora.sharding.vocabulary import Vocabulary

HIDDEN, VOCAB, PADDED, LAYERS = 32, 90, 96, 3  # the second TP rank's last 6 ids are padding
ADAPTERS = {"both": ("embed_tokens", "lm_head"), "embedding": ("embed_tokens",), "head": ("lm_head",), "neither": ()}
Deltas = dict[str, dict[str, torch.Tensor]]


def spec_of(rank: int) -> ModelSpec:
    half, ids = Interval(16 * rank, 16 * rank + 16, 32), Interval(48 * rank, 48 * rank + 48, VOCAB)
    axes: Axes = {"hidden": Interval(0, HIDDEN, HIDDEN), "query": half, "key_value": half}
    layers = {f"model.layers.{i}": axes for i in range(LAYERS)}
    vocabulary = Vocabulary("model.embed_tokens", "lm_head", ids)
    options = {"dtype": torch.float32, "vocab_size": VOCAB, "tp_rank": rank, "tp_size": 2}
    return model_spec(layers, vocabulary=vocabulary, **options)


def write(folder: Path, names: tuple[str, ...], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """An adapter's folder; ``embed_tokens`` and ``lm_head`` -> its delta [ids, hidden] in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    prefix = "base_model.model"
    tensors = {f"{prefix}.model.layers.0.self_attn.q_proj.lora_A.weight": draw(rank, HIDDEN)}
    tensors[f"{prefix}.model.layers.0.self_attn.q_proj.lora_B.weight"] = draw(32, rank)
    deltas = {}
    if "embed_tokens" in names:
        a, b = draw(rank, VOCAB), draw(HIDDEN, rank)
        tensors |= {f"{prefix}.model.embed_tokens.lora_embedding_{one}": f for one, f in (("A", a), ("B", b))}
        deltas["embed_tokens"] = 2.0 * (b.double() @ a.double()).t()
    if "lm_head" in names:
        a, b = draw(rank, HIDDEN), draw(VOCAB, rank)
        tensors |= {f"{prefix}.lm_head.lora_{one}.weight": f for one, f in (("A", a), ("B", b))}
        deltas["lm_head"] = 2.0 * (b.double() @ a.double())
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", *names]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def pool_of(folder: Path, spec: ModelSpec, own: Sequence[str] = tuple(ADAPTERS)) -> tuple[StaticPool, Deltas]:
    """A pool in which the adapters ``own`` are resident, and their deltas."""
    deltas = {name: write(folder / name, ADAPTERS[name], 3 + seed, seed) for seed, name in enumerate(own)}
    return resident_pool(spec, {name: folder / name for name in own}), deltas


BATCHES: list[tuple[list[str | None], list[int] | None]] = [
    (["both", None, "embedding", "head"], [3, 2, 4, 3]),
    (["head", "both"], [1, 1]),
    (["embedding", None], [2, 1]),
    (["head", "neither", None, "both", "both"], None),
    (["neither", None], None),
]


def check(adder, spec: ModelSpec, deltas: Deltas) -> None:
    """Embeddings, and logits of all tokens, of the last of each request, and of some in two parts.

    What the step keeps between launches begins as no number: nothing may be read before it is written.
    """
    ids_of_rank = spec.layers[0][2].inputs.start
    for keys, counts in BATCHES:
        adder.prepare(keys, counts)
        if not isinstance(adder, TorchAdder):
            for batch in (*adder._row_batches, *adder._row_batches.values()):
                batch.h.fill_(torch.nan)
        per_token = [key for key, n in zip(keys, counts or [1] * len(keys), strict=True) for _ in range(n)]
        generator = torch.Generator().manual_seed(len(per_token))
        ids = torch.randint(0, VOCAB, (len(per_token),), generator=generator)
        out = torch.randn(len(ids), HIDDEN, generator=generator)
        expected = out.double()
        for t, key in enumerate(per_token):
            delta = deltas.get(key, {}).get("embed_tokens")
            if delta is not None and 0 <= int(ids[t]) - ids_of_rank < PADDED // 2:
                expected[t] += delta[ids[t]]
        adder.add_to_embeddings_(out, ids)
        torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-3)
        assert adder.adapts_head == any(key in ("both", "head") for key in keys)
        if not adder.adapts_head:
            continue
        last = torch.tensor(counts).cumsum(0) - 1 if counts else torch.arange(len(ids))
        for tokens, parts in ((None, 1), (last, 1), (torch.arange(len(ids)).flip(0), 2)):
            rows = per_token if tokens is None else [per_token[t] for t in tokens.tolist()]
            hidden = torch.randn(len(rows), HIDDEN, generator=generator)
            logits = torch.randn(len(rows), PADDED // 2, generator=generator)
            wanted = logits.double()
            for row, key in enumerate(rows):
                delta = deltas.get(key, {}).get("lm_head")
                if delta is not None:
                    own = delta[ids_of_rank : ids_of_rank + PADDED // 2]
                    wanted[row, : len(own)] += own @ hidden[row].double()
            adder.prepare_logits(tokens)
            for some, states in zip(logits.chunk(parts), hidden.chunk(parts), strict=True):
                adder.add_to_logits_(some, states)
            torch.testing.assert_close(logits.double(), wanted, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_torch_adder(tmp_path: Path, rank: int) -> None:
    spec = spec_of(rank)
    pool, deltas = pool_of(tmp_path, spec)
    check(TorchAdder(spec, pool), spec, deltas)


def check_triton(folder: Path) -> None:
    """Run where the interpreter is on: eager batches, and decode batches that a graph may replay."""
    from sglang_blocklora.batch.triton_adder import TritonAdder

    for rank in (0, 1):
        spec = spec_of(rank)
        pool, deltas = pool_of(folder / str(rank), spec)
        adder = TritonAdder(spec, pool, 16, torch.device("cpu"), max_tokens=8)
        check(adder, spec, deltas)
        adder.init_graphs("decode", 8)
        adder.prepare_capture("decode", 5)
        assert adder.adapts_head, "a graph holds the head's deltas, whichever adapters it is replayed with"
        assert not adder.not_captured(frozenset({"layer", "embedding", "head"}))
        check(adder, spec, deltas)
        few, _ = pool_of(folder / f"{rank}-few", spec, ("neither",))
        adder = TritonAdder(spec, few, 16, torch.device("cpu"), max_tokens=8)
        assert not adder.not_captured(frozenset({"head"})), "without graphs nothing has to be captured"
        adder.init_graphs("decode", 8)
        adder.prepare_capture("decode", 5)
        assert not adder.adapts_head, "what no adapter is on costs a graph nothing"
        assert adder.not_captured(frozenset({"layer", "head"})) == {"head"}


def test_triton_adder_in_the_interpreter(tmp_path: Path) -> None:
    in_interpreter(__file__, tmp_path, "check_triton")
