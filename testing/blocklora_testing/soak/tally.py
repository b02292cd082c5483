"""What a run counted: requests by kind and what became of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

PROBLEMS_SHOWN = 5  # of one kind


@dataclass
class Row:
    """Requests of one kind: answered with PEFT's tokens, refused as they had to be, aborted, and all that was wrong."""

    right: int = 0
    refused: int = 0
    aborted: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.right + self.refused + self.aborted + len(self.problems)

    def quantile(self, share: float) -> float:
        return sorted(self.seconds)[int(share * (len(self.seconds) - 1))] if self.seconds else 0.0


class Tally:
    """Rows by kind, in the order in which kinds came."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = defaultdict(Row)

    def right(self, kind: str, seconds: float, requests: int = 1) -> None:
        self.rows[kind].right += requests
        self.rows[kind].seconds.append(seconds)

    def refused(self, kind: str, seconds: float, requests: int = 1) -> None:
        self.rows[kind].refused += requests
        self.rows[kind].seconds.append(seconds)

    def aborted(self, kind: str) -> None:
        self.rows[kind].aborted += 1

    def problem(self, kind: str, text: str) -> None:
        self.rows[kind].problems.append(text)

    @property
    def requests(self) -> int:
        return sum(row.requests for row in self.rows.values())

    @property
    def problems(self) -> list[str]:
        """The first few of each kind, to be read."""
        return [f"{kind}: {text}" for kind, row in self.rows.items() for text in row.problems[:PROBLEMS_SHOWN]]
