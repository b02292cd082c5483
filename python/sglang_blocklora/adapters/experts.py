"""What PEFT has for the weights of all experts of a layer (``target_parameters``), as one module for each expert.

PEFT wraps the module of a layer's experts once for each parameter, the first one innermost. A wrapper has one pair of
factors for all E experts (``ParamWrapper`` of peft/tuners/lora/layer.py): ``lora_A`` [E r, in], expert by expert, and
``lora_B`` [out, r E], in which the experts take turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sglang_blocklora.adapters.config import AdapterConfig
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.sharding.architectures import FUSED_PARTS
from sglang_blocklora.sharding.cut import Factor

WRAPPER = re.compile(r"(?P<module>.+\.experts)(?P<inner>(?:\.base_layer)*)", re.DOTALL)
MOST_EXPERTS = 4096  # of a layer; a file that claims more is not worth the memory of their names
Shapes = Mapping[Factor, tuple[int, int]]


class OfExpert(NamedTuple):
    """One expert's part of the factors of ``wrapper``, a module of the weights."""

    wrapper: str
    rank: int
    expert: int
    experts: int

    def rows_of_a(self, rows: slice | None) -> slice:
        """Rows of the stored A that hold ``rows`` of the expert's."""
        start, stop = (rows.start, rows.stop) if rows else (0, self.rank)
        return slice(self.expert * self.rank + start, self.expert * self.rank + stop)

    def columns_of_b(self, columns: slice | None) -> slice:
        """Columns of the stored B that hold ``columns`` of the expert's; they lie ``experts`` apart."""
        start, stop = (columns.start, columns.stop) if columns else (0, self.rank)
        return slice(start * self.experts + self.expert, stop * self.experts, self.experts)


def is_wrapper(module: str) -> bool:
    """Whether ``module`` of the weights is a wrapper of all experts of a layer."""
    return WRAPPER.fullmatch(module) is not None


def experts_of(
    adapter: str, config: AdapterConfig, stored: Mapping[str, Shapes]
) -> Iterator[tuple[str, OfExpert, Shapes]]:
    """Module, its part and its own shapes, for each expert of each wrapper in ``stored``. Raises ``AdapterError``."""
    depths: dict[str, list[str]] = {}
    for name in stored:
        if match := WRAPPER.fullmatch(name):
            depths.setdefault(match["module"], []).append(name)
    for module, wrappers in sorted(depths.items()):
        chosen = [part for part in FUSED_PARTS if config.targets.selects_parameter(f"{module}.{part}")]
        wrappers.sort(key=len, reverse=True)  # the innermost first
        if len(chosen) != len(wrappers):
            raise AdapterError(
                adapter,
                f"weights for {len(wrappers)} of its parameters",
                f"as many as target_parameters selects ({', '.join(chosen) or 'none'})",
                "Check that adapter_config.json belongs to these weights.",
                module,
            )
        for part, wrapper in zip(chosen, wrappers, strict=True):
            yield from _split(adapter, f"{module}.{part}", wrapper, config, stored[wrapper])


def _split(
    adapter: str, parameter: str, wrapper: str, config: AdapterConfig, shapes: Shapes
) -> Iterator[tuple[str, OfExpert, Shapes]]:
    rank = config.rank_of(parameter)
    (a_rows, inputs), (outputs, b_columns) = shapes["A"], shapes["B"]
    if a_rows % rank or a_rows != b_columns or not 0 < a_rows <= rank * MOST_EXPERTS or not inputs * outputs:
        raise AdapterError(
            adapter,
            f"lora_A {[a_rows, inputs]} and lora_B {[outputs, b_columns]}",
            f"rank {rank} times the number of experts in both, at most {MOST_EXPERTS}",
            "Check that adapter_config.json belongs to these weights.",
            parameter,
        )
    experts = a_rows // rank
    for expert in range(experts):
        own: Shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        yield f"{parameter}[{expert}]", OfExpert(wrapper, rank, expert, experts), own
