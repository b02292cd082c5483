"""Records every decision that all TP ranks must take alike, one file a rank, so that they can be compared."""

from __future__ import annotations

import json
from pathlib import Path


class DecisionLog:
    """Writes one JSON line a decision to ``<path>.<tp_rank>``; does nothing without a path. No times, no addresses."""

    def __init__(self, path: str | None, tp_rank: int) -> None:
        self._file = Path(f"{path}.{tp_rank}").open("w", buffering=1) if path else None  # noqa: SIM115

    def record(self, kind: str, **fields: object) -> None:
        """Note a decision; ``fields`` are plain values."""
        if self._file is not None:
            self._file.write(json.dumps({"decision": kind} | fields) + "\n")
