"""Joins adapters' deltas inside the experts of a layer: before the activation, and before the weighted sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from blocklora_kernels.reference import LinearFactors, add_delta_
from sglang.srt.layers.activation import GeluAndMul, SiluAndMul
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang_blocklora.batch.torch_adder import TorchAdder
from sglang_blocklora.sharding.architectures import EXPERTS
from torch.nn import functional as F

from blocklora_patches.model.grouped_experts import why_not_grouped
from blocklora_patches.model.linears import Linears, is_compared, layer_path

ACTIVATIONS = {"silu": SiluAndMul, "gelu": GeluAndMul}


def adaptable_experts(
    model: torch.nn.Module, linears: Linears, uses_triton: bool
) -> tuple[dict[int, FusedMoE], str | None]:
    """Experts that adapters can be on: position of a layer in ``linears`` -> SGLang's module of all its experts.

    Empty, and the reason, where a base model's cannot have adapters.
    """
    found = {}
    for i, modules in enumerate(linears):
        layer = model.get_submodule(layer_path(modules))
        for below, _ in EXPERTS:
            module = next((one for name, one in layer.named_modules() if name == below), None)
            if isinstance(module, FusedMoE):
                found[i] = module
    reasons = {why for module in found.values() if (why := _why_not(module))}
    if uses_triton:
        reasons |= {why for module in found.values() if (why := why_not_grouped(module))}
    if found and not is_compared(model):
        reasons.add("this architecture was not compared with PEFT")
    return ({}, ", ".join(sorted(reasons))) if reasons else (found, None)


def _why_not(experts: FusedMoE) -> str | None:
    config, method = experts.moe_runner_config, experts.quant_method
    table = (
        (type(method) is not UnquantizedFusedMoEMethod, f"their weights are quantised ({type(method).__name__})"),
        (experts.moe_ep_size > 1, "each rank of --ep-size holds only some of them"),
        (
            experts.num_fused_shared_experts > 0,
            "shared experts are fused with them (--disable-shared-experts-fusion)",
        ),
        (config.activation not in ACTIVATIONS or config.gemm1_alpha is not None, "their activation is another"),
        (config.apply_router_weight_on_input, "the router's weights are applied to their inputs"),
        (config.routed_scaling_factor not in (None, 1.0), "what they put out is scaled"),
        (getattr(experts, "w13_weight_bias", None) is not None, "they have biases"),
    )
    return next((why for on, why in table if on), None)


class AdaptedExpertsMethod(torch.nn.Module):  # as upstream's is, which its layer holds as a submodule
    """A quant method of experts that does what the base layer's own does, for all tokens without an adapter on them.

    For the others it computes each expert with its deltas, one after another as Hugging Face's modules do. The output
    is the TP rank's part, which upstream reduces; no collective is added.
    """

    def __init__(self, experts: FusedMoE, step: TorchAdder, layer: int) -> None:
        super().__init__()
        self.base = experts.quant_method
        self._step = step
        self._layer = layer
        self._activation = ACTIVATIONS[experts.moe_runner_config.activation]()

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:  # type: ignore[override]
        """The local output [tokens, hidden] of the experts, weighted and added up, deltas included."""
        adapted = self._step.experts(self._layer)
        if not adapted:
            return self.base.apply(layer=layer, dispatch_output=dispatch_output)
        x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
        out, plain = torch.empty_like(x), torch.ones(len(x), dtype=torch.bool)
        for rows, factors in adapted:
            plain[rows] = False
            out[rows] = self._adapted(layer, x[rows], topk.topk_weights[rows], topk.topk_ids[rows], factors)
        if bool(plain.any()):
            own = topk._replace(
                topk_weights=topk.topk_weights[plain],
                topk_ids=topk.topk_ids[plain],
                router_logits=topk.router_logits[plain],
            )
            part = dispatch_output._replace(hidden_states=x[plain], topk_output=own)
            out[plain] = self.base.apply(layer=layer, dispatch_output=part).hidden_states
        return StandardCombineInput(hidden_states=out)

    def _adapted(
        self,
        layer: Any,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        factors: Sequence[LinearFactors | None],
    ) -> torch.Tensor:
        """Experts' weighted sum [tokens, hidden] for tokens of one adapter.

        weights, ids  [tokens, k], the router's choice
        factors       of expert e's gate and up at 2 e, of its down at 2 e + 1
        """
        total = torch.zeros(x.shape, dtype=weights.dtype)
        for expert in ids.unique().tolist():
            tokens, choices = (ids == expert).nonzero(as_tuple=True)
            gate_up, down = factors[2 * expert : 2 * expert + 2]
            inputs = x[tokens]
            hidden = F.linear(inputs, layer.w13_weight[expert])
            if gate_up is not None:
                add_delta_(hidden, inputs, slice(None), gate_up)
            hidden = self._activation(hidden)
            output = F.linear(hidden, layer.w2_weight[expert])
            if down is not None:
                add_delta_(output, hidden, slice(None), down)
            total.index_add_(0, tokens, output.to(total.dtype) * weights[tokens, choices, None])
        return total.to(x.dtype)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)
