"""What a simulated run leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Record:
    """One request as its client sees it. Times in seconds, lengths in tokens; cached_tokens in whole pages."""

    adapter: int
    arrival_s: float
    prompt_tokens: int
    new_tokens: int
    resident: bool
    alone_s: float  # TTFT on an idle server with nothing cached
    cached_tokens: int = 0
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Seconds for each token of the answer after the first; 0 where there is none."""
        return (self.end_s - self.first_token_s) / max(1, self.new_tokens - 1)


@dataclass
class Outcome:
    """What a run gives: ``records`` in order of arrival, copies, and samples of the share of KV without its adapter."""

    records: list[Record] = field(default_factory=list)
    loads: int = 0
    copied_bytes: int = 0
    retractions: int = 0
    invalid_shares: list[float] = field(default_factory=list)
