"""Memory, reads and exchange of one adapter at ranks 8 to 256, by the layouts of ``shardings.py``. Nothing runs.

python -m benchmark.paper.ranks
"""

from __future__ import annotations

import torch
from sglang_blocklora.tools.base_model import BaseSizes

from benchmark.paper.shardings import (
    EXPERTS,
    LLAMA,
    Sharding,
    held_bytes,
    lora_cost,
    matched_rank,
    parameters,
    served,
    sources,
)
from benchmark.record import Recorder

RANKS = (8, 16, 32, 64, 128, 256)
TP_SIZES = (1, 2, 4, 8)
DTYPE = torch.bfloat16


def figures(base: BaseSizes, sharding: Sharding, plain_rank: int, tp: int) -> dict[str, float]:
    """Of an adapter with no more parameters than the plain one of ``plain_rank``, on the TP rank that it costs most.

    held_over_share, beside_largest_over_share   its memory over an Nth of the plain adapter's bytes (N: TP size), on a
                     server whose largest rank is its own, and on one that serves the largest of ``RANKS`` too
    padding          of that memory, over what it needs, on the first server
    ..._per_rank     of a decode forward of one token, for each unit of ``plain_rank``
    """
    rank = matched_rank(base, plain_rank, tp) if sharding == "block-diagonal" else plain_rank
    cost = lora_cost(base, sharding, rank, tp, 1, DTYPE)
    share = parameters(base, plain_rank) * DTYPE.itemsize / tp
    alone, beside = (held_bytes(base, sharding, rank, largest, tp, DTYPE) for largest in (rank, max(RANKS)))
    return {
        "held_over_share": alone / share,
        "beside_largest_over_share": beside / share,
        "padding": alone / cost.adapter_bytes - 1,
        "read_bytes_per_rank": cost.read_bytes / plain_rank,
        "flops_per_rank": cost.flops / plain_rank,
        "sent_bytes_per_rank": cost.sent_bytes / plain_rank,
        "collectives": cost.all_gathers + cost.all_reduces,
    }


def main() -> None:
    settings = {
        "computed": f"as the counts of r = 16, bfloat16; the layouts of others by their code: {sources()}",
        "rounds": f"plain rank r in {RANKS}; block-diagonal with N blocks and no more parameters",
        "share": "an Nth of the plain adapter's bytes, N being the TP size",
        "largest": f"on a server that serves rank {max(RANKS)} too",
    }
    recorder = Recorder("counts_ranks", 0, settings)
    for name, base in (LLAMA | EXPERTS).items():
        for tp in TP_SIZES:
            for sharding in served(base):
                for round_, plain_rank in enumerate(RANKS):
                    recorder.add(f"{name}, TP {tp}", sharding, round_, figures(base, sharding, plain_rank, tp))
    recorder.finish()


if __name__ == "__main__":
    main()
