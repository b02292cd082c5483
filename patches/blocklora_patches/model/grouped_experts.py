"""Joins adapters' deltas inside the experts of a layer on a GPU: where SGLang's Triton runner lets its own LoRA in.

Between the two grouped products of a layer, and between the second and the weighted sum, that runner calls hooks with
its buffers. Ours add the deltas of all (expert, adapter) pairs of the batch with one launch each of shrink and expand.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.moe import MoeRunnerBackend
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner.runner import MoeRunner
from sglang.srt.layers.moe.moe_runner.triton import TritonRunnerCore
from sglang.srt.runtime_context import get_exec
from sglang_blocklora.batch.triton_adder import TritonAdder

Hook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def why_not_grouped(experts: FusedMoE) -> str | None:
    """Why adapters cannot join these experts' runner; None where they can."""
    method, config, execution = experts.quant_method, experts.moe_runner_config, get_exec()
    core = getattr(getattr(method, "runner", None), "runner_core", None)
    table = (
        (experts.w13_weight.device.type != "cuda", "with --kernels triton they need a GPU"),
        (type(core) is not TritonRunnerCore, f"they are computed by {type(core).__name__}, not by the Triton runner"),
        (getattr(method, "w13_swiglu_interleaved", False), "their gate and up are interleaved"),
        (execution.moe.enable_fused_moe_sum_all_reduce, "--enable-fused-moe-sum-all-reduce adds them up at once"),
        (bool(config.no_combine), "they are not added up in their layer"),
        (execution.deterministic.enable_deterministic_inference, "their tiles follow from the batch"),
    )
    return next((why for on, why in table if on), None)


@dataclasses.dataclass(frozen=True)
class JoiningHooks:
    """What the runner calls: with hidden states [tokens, hidden] and its buffers of a row for each token's choice."""

    after_gate_up: Hook
    after_down: Hook


def joining_hooks(step: TritonAdder, layer: int) -> JoiningHooks:
    """Add ``step``'s deltas of ``layer``."""

    def after_gate_up(x: torch.Tensor, out: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        step.add_to_gate_up_(layer, out.view(-1, out.shape[-1]), x, ids)

    def after_down(x: torch.Tensor, out: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        step.add_to_down_(layer, out.view(-1, out.shape[-1]), x[: ids.numel()], weights.reshape(-1).float())

    return JoiningHooks(after_gate_up, after_down)


class JoinedRunnerCore(TritonRunnerCore):
    """SGLang's Triton runner with hooks that are always the same."""

    def __init__(self, config: Any, hooks: JoiningHooks) -> None:
        super().__init__(config)
        self._hooks = hooks

    def run(self, runner_input: Any, quant_info: Any, running_state: dict[str, Any], hooks: Any = None) -> Any:
        return super().run(runner_input, quant_info, running_state, hooks=self._hooks)


class GroupedExpertsMethod(torch.nn.Module):  # as upstream's is, which its layer holds as a submodule
    """A quant method of experts that is the base layer's own, and adds the batch's deltas where it has some.

    A batch without adapters on experts runs as without us. The output is the TP rank's part, which upstream reduces; no
    collective is added.
    """

    def __init__(self, experts: FusedMoE, step: TritonAdder, layer: int) -> None:
        super().__init__()
        self.base = experts.quant_method
        self._step = step
        self._layer = layer
        # As upstream's own LoRA has it: the products one by one, not in one operation.
        self._joined = MoeRunner(MoeRunnerBackend.TRITON, experts.moe_runner_config, lora_enabled=True)
        self._joined.runner_core = JoinedRunnerCore(experts.moe_runner_config, joining_hooks(step, layer))

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:  # type: ignore[override]
        """The local output [tokens, hidden] of the experts, weighted and added up, deltas included."""
        if not self._step.joins_experts(self._layer):
            return self.base.apply(layer=layer, dispatch_output=dispatch_output)
        with self._joined_runner():
            return self.base.apply(layer=layer, dispatch_output=dispatch_output)

    @contextlib.contextmanager
    def _joined_runner(self) -> Iterator[None]:
        own = self.base.runner
        self.base.runner = self._joined
        try:
            yield
        finally:
            self.base.runner = own

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)
