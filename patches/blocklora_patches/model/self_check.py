"""Checks, at load, an architecture that nobody compared with PEFT: do deltas go where weights go, and are they run?

What a module of the checkpoint becomes in a linear (fused in which order, cut, padded or repeated for which TP rank) is
known to the model's own loader and to nobody else. So a probe's product ``B A`` is given to that loader as the module's
weights, and what then lies in the linear is compared with what our code makes of the adapter (A, B) on this TP rank,
from its file on. Both are small whole numbers: equal to the last bit, or wrong. The weights are put back.

That the linears are what runs is seen in the first forward pass (``FirstPass``).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from blocklora_kernels.reference import add_delta_, read_linear
from safetensors.torch import save_file
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang_blocklora.adapters.checkpoint import WEIGHTS_NAME
from sglang_blocklora.adapters.config import CONFIG_NAME
from sglang_blocklora.adapters.shard import load_shard
from sglang_blocklora.batch.delta_adder import DeltaAdder
from sglang_blocklora.sharding.architectures import suffix_of
from sglang_blocklora.sharding.linears import LinearSpec, ModelSpec
from torch.utils.hooks import RemovableHandle

from blocklora_patches.model.linears import Linears, layer_path

RANK = 2
LARGEST = 7  # of a probe's values: sums of RANK products stay below 2**7, whole numbers that bfloat16 has too
TOKENS = 8
ADVICE = "Start this model with stock SGLang (python -m sglang.launch_server)."


def check_linears(model: torch.nn.Module, linears: Linears, spec: ModelSpec) -> ModelSpec:
    """``spec`` with the checkpoint modules alone that the model's loader takes, after a look at a layer of each kind.

    linears  ``adaptable_linears`` of ``model``, as this TP rank holds it, and ``spec`` what was read off them
    ``ValueError`` naming the first linear whose weights lie elsewhere than ``spec`` says, or that cannot be looked at.
    The model is as before, whatever happens.
    """
    before = _sums(model)
    taken: dict[tuple[object, ...], frozenset[str]] = {}
    layers = []
    for modules, layer in zip(linears, spec.layers, strict=True):
        kind = tuple((linear.kind, linear.inputs, linear.outputs, *map(suffix_of, linear.sources)) for linear in layer)
        if kind not in taken:
            found = [_taken(model, module, one, spec) for (_, module), one in zip(modules, layer, strict=True)]
            taken[kind] = frozenset().union(*found)
        layers.append(tuple(_only(linear, taken[kind]) for linear in layer))
    if _sums(model) != before:
        raise ValueError(f"{_not_compared(model)}, and its loader put a probe's weights into other parameters")
    return dataclasses.replace(spec, layers=tuple(layers))


def _taken(model: Any, module: torch.nn.Module, linear: LinearSpec, spec: ModelSpec) -> set[str]:
    """Names of the checkpoint modules of ``linear`` that the loader takes; every slice that one is to feed has one."""
    where, shape = f"{_not_compared(model)}, and {linear.name}", (linear.out_offsets[-1], linear.inputs.length)
    weight = getattr(module, "weight", None)
    if not isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod) or weight is None:
        raise ValueError(f"{where} is quantised, so its layout cannot be checked. {ADVICE}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{where} has weights of shape {list(weight.shape)}, not {list(shape)}")
    taken, slices, refused = set(), set(), "it does not know their names"
    weights = weight.data.clone()
    try:
        for name, source in linear.sources.items():
            a, b = _whole_numbers(RANK, linear.inputs.size), _whole_numbers(source.size, RANK)
            weight.data.zero_()
            try:
                model.load_weights([(f"{name}.weight", (b @ a).to(weight.dtype))])
            except Exception as error:  # whatever a loader does with a name that is not its own
                refused = f"{type(error).__name__}: {error}"
                continue
            x = _whole_numbers(TOKENS, linear.inputs.length).double()
            delta = _delta(name, a, b, x, linear, spec)
            if delta.any() and not weight.any():
                continue
            if not torch.equal(x @ weight.double().cpu().t(), delta):
                raise ValueError(
                    f"{where} holds the weights of {name} in another way than adapters are cut for it (fused, ordered, "
                    f"padded or repeated). {ADVICE}"
                )
            taken.add(suffix_of(name))
            slices.update(source.slices)
    finally:
        weight.data.copy_(weights)
    if slices != {index for source in linear.sources.values() for index in source.slices}:
        raise ValueError(f"{where} does not take the weights of {', '.join(linear.sources)} ({refused})")
    return taken


def _delta(
    name: str, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor, linear: LinearSpec, spec: ModelSpec
) -> torch.Tensor:
    """What the adapter (a, b) on module ``name`` adds for ``x`` on this TP rank, read as any adapter is."""
    alone = dataclasses.replace(spec, layers=((linear,),), dtype=torch.float32)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [suffix_of(name)]}
    with tempfile.TemporaryDirectory() as path:
        folder, prefix = Path(path), f"base_model.model.{name}"
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / WEIGHTS_NAME)
        shard, image = load_shard("probe", folder, alone, RANK, known=True)
    delta = torch.zeros(len(x), linear.out_offsets[-1], dtype=torch.float64)
    descriptor = shard.descriptors[0][0]
    if not descriptor.h_width:  # the rank holds nothing of the module but padding
        return delta
    slots, planes = torch.arange(shard.slots), image[0].double().unbind()
    factors = read_linear(descriptor, shard.scalings[0][0], planes, slots, linear.inputs.length, linear.out_offsets)
    add_delta_(delta, x, slice(None), factors)
    return delta


def _whole_numbers(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)  # the same on every TP rank
    return torch.randint(-LARGEST, LARGEST + 1, (rows, columns), generator=generator).float()


def _only(linear: LinearSpec, suffixes: Collection[str]) -> LinearSpec:
    sources = {name: source for name, source in linear.sources.items() if suffix_of(name) in suffixes}
    return dataclasses.replace(linear, sources=sources)


def _sums(model: torch.nn.Module) -> list[str]:
    """A sum over each parameter, to its last bit; as text, since not a number equals nothing."""
    return [float(one.data.sum(dtype=torch.float64)).hex() for one in model.parameters() if one.is_floating_point()]


def _not_compared(model: torch.nn.Module) -> str:
    return f"{type(model).__name__} was not compared with PEFT"


class FirstPass(DeltaAdder):
    """Stands before ``step`` in one forward pass of a model whose linears may be computed past their quant methods.

    When the last decoder layer has run, all linears must have asked for their deltas: else ``RuntimeError``, before
    anything of that pass is answered.
    """

    def __init__(self, step: DeltaAdder, model: torch.nn.Module, linears: Linears) -> None:
        self._step = step
        self._left = {(i, j): path for i, layer in enumerate(linears) for j, (path, _) in enumerate(layer)}
        self._architecture = _not_compared(model)
        self._passes = 0
        last_layer = model.get_submodule(layer_path(linears[-1]))
        self._handle: RemovableHandle | None = last_layer.register_forward_hook(self._end)

    def begin(self) -> None:
        """Called before each pass. ``RuntimeError`` where one has gone by unseen."""
        self._passes += 1
        if self._handle is not None and self._passes > 1:
            raise RuntimeError(f"{self._architecture}, and how its decoder layers run cannot be seen. {ADVICE}")

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        self._step.start(layer, linear, x)

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        self._left.pop((layer, linear), None)
        self._step.add_delta_(layer, linear, out, x)

    def _end(self, *_: Any) -> None:
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if self._left:
            some = ", ".join(sorted(self._left.values())[:3])
            raise RuntimeError(
                f"{self._architecture}, and {len(self._left)} of its linears ({some}) are computed past the place "
                f"where adapters join. {ADVICE}"
            )
