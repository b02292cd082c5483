"""Groups the tokens of a batch by the adapter of their request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from blocklora_kernels.segments import Segments


def group_by_adapter(adapters: Sequence[int], token_counts: Sequence[int] | None) -> Segments:
    """Segments of a batch: each request's adapter index (negative: base model) and its tokens (None: one each)."""
    counts = None if token_counts is None else np.asarray(token_counts, dtype=np.int64)
    return Segments.build(np.asarray(adapters, dtype=np.int32), counts)
