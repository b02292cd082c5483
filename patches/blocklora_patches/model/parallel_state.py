"""``distributed/parallel_state.py``: the TP group, as the mechanism's ``Collectives``."""

from __future__ import annotations

import torch
from sglang.srt.runtime_context import get_parallel
from sglang_blocklora.batch.s_lora_step import Collectives


class TPCollectives(Collectives):
    """SGLang's own collectives of the TP group."""

    def all_gather(self, values: torch.Tensor) -> torch.Tensor:
        return get_parallel().tp_group.all_gather(values[None], dim=0)

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        return get_parallel().tp_group.all_reduce(values)
