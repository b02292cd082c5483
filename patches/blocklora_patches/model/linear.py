"""Adds the batch's deltas to a linear's local output, before the linear's own reduction (``layers/linear.py``).

Every parallel linear of SGLang computes its local output with ``quant_method.apply`` and reduces or gathers it
afterwards. Standing in for the quant method therefore serves column and row layers, quantised or not, and every fused
or skipped all-reduce, with none of upstream's forward code repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.plugins.hook_registry import HookType
from sglang_blocklora.batch.delta_adder import DeltaAdder

from blocklora_patches.hooks.hook import Hook, Process
from blocklora_patches.releases.current import release


class AdaptedLinearMethod(LinearMethodBase):
    """A quant method that does what the base layer's own does, and adds the batch's deltas.

    It is not an instance of the base method's class, so upstream's fast paths that read ``weight`` directly (they test
    for that class) fall back to ``apply``. Those that tested before it was there are asked again, by the hooks below.
    """

    def __init__(self, base: LinearMethodBase, step: DeltaAdder, layer: int, linear: int) -> None:
        self.base = base
        self._step = step
        self._layer = layer
        self._linear = linear
        if hasattr(base, "apply_into"):
            self.apply_into = self._apply_into

    def create_weights(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        self.base.restore_weights_before_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The local output [tokens, local outputs], deltas included.

        ``TypeError`` for an input that upstream has quantised already: it asks the quant method's class first.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"an adapted linear ({type(self.base).__name__}) needs tokens, but its input was quantised before it"
            )
        self._step.start(self._layer, self._linear, x)
        out = self.base.apply(layer, x, bias)
        self._step.add_delta_(self._layer, self._linear, out, x)
        return out

    def _apply_into(self, layer: torch.nn.Module, x: torch.Tensor, output: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._step.start(self._layer, self._linear, x)
        out = self.base.apply_into(layer, x, output, **kwargs)
        self._step.add_delta_(self._layer, self._linear, out, x)
        return out

    def __getattr__(self, name: str) -> Any:
        if name.startswith("apply"):  # another way to compute the output, which would leave out the deltas
            raise AttributeError(f"{type(self).__name__} has no {name}: adapters do not join it")
        return getattr(self.base, name)


def adapt_linear(module: torch.nn.Module, step: DeltaAdder, layer: int, linear: int) -> None:
    """Let ``step`` add to what ``module`` computes, whoever computes it."""
    module.quant_method = AdaptedLinearMethod(module.quant_method, step, layer, linear)
    module.set_lora = True  # upstream asks it where a kernel would read the weights of few tokens' linears directly


def _can_run(original: Any, self: Any, x: Any, linear: Any) -> bool:
    return not isinstance(linear.quant_method, AdaptedLinearMethod) and bool(original(self, x, linear))


HOOKS = tuple(
    Hook(
        target,
        _can_run,
        HookType.AROUND,
        process=Process.SCHEDULER,
        why="Upstream decides as the model is built, without adapters, that one kernel computes a linear and what "
        "follows it: the deltas would be left out in silence.",
        retire_when="upstream asks the quant method of each call",
    )
    for target in release.FUSED_LINEARS
)
