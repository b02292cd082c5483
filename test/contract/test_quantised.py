"""Quantised base layers: SGLang's own layers and quant methods, with what a CPU lacks, the kernels, in plain torch.

Each method is asked once, with the input as it is, and the delta is added to its output; its weights stay its own. The
expected values are those of the dequantised weights in float64.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from blocklora_kernels.reference import ExpandFactor, LinearFactors, add_delta_
from blocklora_testing.architectures.ranks import tp_rank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # upstream's imports warn about missing GPUs
    import sglang.srt.layers.quantization as methods
    from blocklora_kernels.descriptor import Blocks
    from blocklora_patches.model.linear import AdaptedLinearMethod
    from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.quantization import get_quantization_config
    from sglang.srt.layers.quantization.base_config import LinearMethodBase
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

HIDDEN, HEADS, KV_HEADS, HEAD, GROUP = 256, 8, 4, 64, 128
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the 4-bit numbers in a 32-bit one


class Method(NamedTuple):
    """A quantisation as a checkpoint names it, and what its weights mean: [out, in] in float64."""

    name: str
    config: dict[str, Any]
    dense: Callable[[Any], torch.Tensor]


def scaled(layer: Any) -> torch.Tensor:
    """One scale for each matrix that the layer is made of, or for each row."""
    scale = layer.weight_scale.double()
    if scale.dim() == 1:
        scale = torch.cat([one.expand(rows) for one, rows in zip(scale, layer.logical_widths, strict=True)])[:, None]
    return layer.weight.double() * scale


def in_blocks(layer: Any) -> torch.Tensor:
    """A scale for each block of 128 x 128."""
    scale = layer.weight_scale_inv.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    rows, columns = layer.weight.shape
    return layer.weight.double() * scale[:rows, :columns]


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit numbers of each 32-bit one, in the order of columns."""
    return torch.stack([packed >> 4 * place & 15 for place in AWQ_ORDER], dim=-1).double().flatten(1)


def awq(layer: Any) -> torch.Tensor:
    q, zeros = unpacked(layer.qweight), unpacked(layer.qzeros).repeat_interleave(GROUP, 0)
    return ((q - zeros) * layer.scales.double().repeat_interleave(GROUP, 0)).t()


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
METHODS = (
    Method("fp8", FP8, scaled),
    Method("fp8", FP8 | {"activation_scheme": "static"}, scaled),
    Method("fp8", FP8 | {"weight_block_size": [128, 128]}, in_blocks),
    Method("awq", {"bits": 4, "w_bit": 4, "group_size": GROUP, "q_group_size": GROUP, "zero_point": True}, awq),
    Method("w8a8_int8", {}, scaled),
    Method("blockwise_int8", {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, in_blocks),
)


def layers_of(method: Method) -> Iterator[Any]:
    """SGLang's layers of each kind, as TP rank 1 of 2 builds them, with random weights."""
    config = get_quantization_config(method.name).from_config({"quant_method": method.name} | method.config)
    common: dict[str, Any] = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
    for kind, sizes, more in (
        (QKVParallelLinear, (HIDDEN, HEAD, HEADS, KV_HEADS), {"prefix": "model.layers.0.self_attn.qkv_proj"}),
        (MergedColumnParallelLinear, (HIDDEN, [512, 512]), {"prefix": "model.layers.0.mlp.gate_up_proj"}),
        (RowParallelLinear, (512, HIDDEN), {"prefix": "model.layers.0.mlp.down_proj", "reduce_results": False}),
    ):
        with tp_rank(1, 2), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # upstream's, that a format is experimental
            layer = kind(*sizes, **common, **more)
        for parameter in layer.parameters():
            if parameter.dtype == torch.int32:
                parameter.data.random_(-(2**31), 2**31)
            elif parameter.dtype == torch.int8:
                parameter.data.random_(-128, 128)
            else:
                parameter.data.copy_(torch.rand(parameter.shape) * 0.1 + 0.01)
        yield layer


class Kernel:
    """What a quant method's ``apply`` does, in float64."""

    def __init__(self, dense: torch.Tensor) -> None:
        self.dense = dense
        self.asked: list[torch.Tensor] = []

    def __call__(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.asked.append(x)
        return (x.double() @ self.dense.t()).to(x.dtype)


class Step:
    """Adds one adapter's delta to all tokens."""

    def __init__(self, factors: LinearFactors) -> None:
        self.factors = factors

    def start(self, layer: int, linear: int, x: torch.Tensor) -> None:
        assert x.dtype == self.factors.a.dtype

    def add_delta_(self, layer: int, linear: int, out: torch.Tensor, x: torch.Tensor) -> None:
        add_delta_(out, x, slice(None), self.factors)


@pytest.mark.parametrize(
    "method", METHODS, ids=lambda method: "-".join(str(one) for one in (method.name, *method.config.values()))
)
def test_a_delta_is_added_to_what_the_quantised_layer_computes(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for layer in layers_of(method):
        dense = method.dense(layer)
        rows, columns = dense.shape
        a, b = torch.randn(4, columns), torch.randn(rows, 4)
        base, kernel = layer.quant_method, Kernel(dense)
        assert type(base).__module__.startswith("sglang.")
        monkeypatch.setattr(base, "apply", kernel)
        factors = LinearFactors(4, a, Blocks(1, columns, 0), (ExpandFactor(b, 0, 4, Blocks(1, rows, 0), 0, 0.5),))
        layer.quant_method = AdaptedLinearMethod(base, Step(factors), 0, 0)
        x = torch.randn(5, columns)
        with tp_rank(1, 2):
            out, _ = layer(x)
        assert [one is x for one in kernel.asked] == [True]
        expected = x.double() @ (dense + 0.5 * b.double() @ a.double()).t()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
        assert getattr(layer.quant_method, "quant_config", None) is getattr(base, "quant_config", None)


def test_no_method_has_another_way_to_compute_a_linear() -> None:
    """Of SGLang's methods of linears, that of unquantised weights alone has another than ``apply``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(methods.__path__, f"{methods.__name__}."):
            try:
                importlib.import_module(module.name)
            except ImportError:  # kernels of hardware that is not here
                continue
    ways = {
        one.__name__: sorted(name for name in dir(one) if name.startswith("apply") and name != "apply")
        for one in _subclasses(LinearMethodBase)
        if one.__module__.startswith("sglang.")
    }
    assert len(ways) > 10
    assert {name for name, others in ways.items() if others} <= {"UnquantizedLinearMethod"}


def _subclasses(one: type) -> Iterator[type]:
    for below in one.__subclasses__():
        yield below
        yield from _subclasses(below)


def test_no_norm_quantises_the_input_of_an_adapted_linear() -> None:
    """SGLang 0.5.22 and later fuse a static FP8 scale into the norm before; deltas need the input itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layernorm = importlib.import_module("sglang.srt.layers.layernorm")
    if not hasattr(layernorm, "_fp8_static_input_scale"):
        pytest.skip("SGLang 0.5.21 does not fuse it")
    layer = next(layers_of(METHODS[1]))
    layer.input_scale = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)
    assert isinstance(layer.quant_method, Fp8LinearMethod)
    assert layernorm._fp8_static_input_scale(layer) is not None, "it would be quantised"
    layer.quant_method = AdaptedLinearMethod(layer.quant_method, None, 0, 0)
    assert layernorm._fp8_static_input_scale(layer) is None


def test_an_input_that_was_quantised_before_is_refused() -> None:
    """It must never be read as tokens: the delta would be of something else."""
    base = next(layers_of(METHODS[1])).quant_method
    method = AdaptedLinearMethod(base, None, 0, 0)
    with pytest.raises(TypeError, match="its input was quantised before it"):
        method.apply(torch.nn.Module(), (torch.zeros(1, 4), torch.ones(1)))
