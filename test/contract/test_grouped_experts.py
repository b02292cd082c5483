"""Deltas join SGLang's own Triton runner of experts, whose products are in torch here, as float64 has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocklora_testing.architectures.ranks import tp_rank
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    from blocklora_patches.model.grouped_experts import GroupedExpertsMethod, why_not_grouped
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerCore
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

HIDDEN, WIDTH, EXPERTS, CHOICES, TOKENS, RANK = 32, 16, 4, 2, 9, 3


def product(a: Any, b: Any, bias: Any, out: Any, *rest: Any, **options: Any) -> None:
    """SGLang's grouped product, as its kernel computes it: a row of ``out`` for each pair of a token and a choice."""
    weights, ids, mul_weights, choices = rest[3], rest[4], rest[8], rest[9]
    rows = out.view(-1, out.shape[-1])
    for pair, expert in enumerate(ids.flatten().tolist()):
        row = a[pair // choices] @ b[expert].t()
        rows[pair] = row * weights.flatten()[pair] if mul_weights else row


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What needs a GPU of SGLang's sequence, in torch; all else is its own."""

    def silu_and_mul(x: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        gate, up = x.chunk(2, dim=-1)
        out.copy_(F.silu(gate) * up)

    prepared = ({"BLOCK_SIZE_M": 16}, None, False, False, None, None, None)
    monkeypatch.setattr(fused_moe, "_prepare_fused_moe_run", lambda *_, **__: prepared)
    monkeypatch.setattr(fused_moe, "invoke_fused_moe_kernel", product)
    monkeypatch.setattr(fused_moe, "silu_and_mul", silu_and_mul, raising=False)
    monkeypatch.setattr(fused_moe, "_is_cuda", True)
    with tp_rank(0, 1):
        yield


class Step:
    """One adapter on all experts, which every second token has; float64 factors, A [experts, r, in], B [.., out, r]."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.gate_up = draw(EXPERTS, RANK, HIDDEN), draw(EXPERTS, 2 * WIDTH, RANK)
        self.down = draw(EXPERTS, RANK, WIDTH), draw(EXPERTS, HIDDEN, RANK)
        self.joins, self.ids = True, torch.empty(0)

    def joins_experts(self, layer: int) -> bool:
        return self.joins

    def add_to_gate_up_(self, layer: int, out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor) -> None:
        assert (layer, tuple(x.shape), tuple(out.shape)) == (7, (TOKENS, HIDDEN), (TOKENS * CHOICES, 2 * WIDTH))
        self.ids = ids
        self._add(out, x.repeat_interleave(CHOICES, 0), self.gate_up, torch.ones(TOKENS * CHOICES))

    def add_to_down_(self, layer: int, out: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
        assert (tuple(x.shape), tuple(out.shape)) == ((TOKENS * CHOICES, WIDTH), (TOKENS * CHOICES, HIDDEN))
        self._add(out, x, self.down, weights)

    def _add(self, out: torch.Tensor, x: torch.Tensor, factors: Any, weights: torch.Tensor) -> None:
        for pair, expert in enumerate(self.ids.flatten().tolist()):
            if pair // CHOICES % 2 == 0:
                a, b = factors[0][expert], factors[1][expert]
                out[pair] += (weights[pair] * (b @ (a @ x[pair].double()))).float()


def made() -> tuple[Any, StandardDispatchOutput]:
    """A layer of experts with a method that runs as on a GPU, and an input."""
    generator = torch.Generator().manual_seed(0)
    layer = FusedMoE(
        num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, layer_id=0, top_k=CHOICES,
        params_dtype=torch.float32,
    )  # fmt: skip
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / 4)
    method = layer.quant_method
    method.apply = lambda layer, dispatch_output: method.forward_cuda(layer, dispatch_output)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, ids = logits.softmax(-1).topk(CHOICES)
    return layer, StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids.int(), logits))


def expected(layer: Any, given: StandardDispatchOutput, step: Step | None) -> torch.Tensor:
    """The weighted sum over the choices in float64, deltas in the weights."""
    rows = []
    for token, x in enumerate(given.hidden_states.double()):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for choice in range(CHOICES):
            expert = int(given.topk_output.topk_ids[token, choice])
            gate_up, down = layer.w13_weight[expert].double(), layer.w2_weight[expert].double()
            if step is not None and token % 2 == 0:
                gate_up = gate_up + step.gate_up[1][expert] @ step.gate_up[0][expert]
                down = down + step.down[1][expert] @ step.down[0][expert]
            gate, up = (gate_up @ x).chunk(2)
            total += given.topk_output.topk_weights[token, choice].double() * (down @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def test_deltas_join_before_the_activation_and_before_the_weighted_sum(upstream: None) -> None:
    layer, given = made()
    step = Step()
    right = expected(layer, given, step)  # the input is overwritten with the output
    own, method = layer.quant_method.runner, GroupedExpertsMethod(layer, step, 7)
    found = method.apply(layer, given).hidden_states
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
    assert layer.quant_method.runner is own, "the base layer's runner is put back"


def test_a_batch_without_adapters_on_experts_runs_as_without_us(upstream: None) -> None:
    layer, given = made()
    step, own = Step(), layer.quant_method.runner
    step.joins = False
    layer.quant_method.apply = lambda layer, dispatch_output: (layer.quant_method.runner, dispatch_output)
    assert GroupedExpertsMethod(layer, step, 7).apply(layer, given) == (own, given)


def runs_on_a_gpu(**changes: Any) -> Any:
    """Experts that adapters can join, but for ``changes``."""
    method = SimpleNamespace(
        runner=SimpleNamespace(runner_core=changes.get("core", object.__new__(TritonRunnerCore))),
        w13_swiglu_interleaved=changes.get("interleaved", False),
    )
    weight = SimpleNamespace(device=torch.device(changes.get("device", "cuda")))
    config = SimpleNamespace(no_combine=changes.get("no_combine", False))
    return SimpleNamespace(quant_method=method, w13_weight=weight, moe_runner_config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "they need a GPU"),
        ({"core": None}, "computed by NoneType, not by the Triton runner"),
        ({"interleaved": True}, "gate and up are interleaved"),
        ({"no_combine": True}, "not added up in their layer"),
    ],
)
def test_other_runners_are_refused(upstream: None, changes: dict[str, Any], message: str) -> None:
    assert message in (why_not_grouped(runs_on_a_gpu(**changes)) or "")


def test_the_triton_runner_is_joined(upstream: None) -> None:
    assert why_not_grouped(runs_on_a_gpu()) is None
