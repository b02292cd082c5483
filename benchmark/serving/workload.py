"""Workloads: who asks which adapter for how many tokens, and when. Numbers only; a client or a simulator plays them.

    from benchmark.serving.workload import Workload

    for session in Workload(sessions=100, rate=2.0, adapters=64, popularity="zipf:1.0", seed=0).generate():
        ...  # session.adapter asks session.turns[0].tokens at session.arrival_s

Equal fields give equal workloads on every machine, and each property is drawn from a stream of its own: with another
popularity the same sessions arrive at the same times with the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

STREAMS = ("adapters", "arrivals", "turns", "prompts", "answers", "think", "tokens")


def popularity(law: str, adapters: int) -> np.ndarray:
    """Probability of each adapter, float64 ``[adapters]``, the most popular first.

    ``slora:ALPHA``  S-LoRA's synthetic trace (arXiv 2311.03285): index ``floor(n * u ** (1 / alpha))`` with u uniform,
                     hence ``((i + 1) / n) ** alpha - (i / n) ** alpha``; 1 is uniform, smaller is more skewed
    ``zipf:S``       proportional to ``(i + 1) ** -s``; 0 is uniform
    ``hot:SHARE``    one adapter has the share, the others divide the rest evenly
    """
    name, _, text = law.partition(":")
    value = float(text or "nan")
    if name == "slora" and value > 0:
        return np.diff((np.arange(adapters + 1) / adapters) ** value)
    if name == "zipf" and value >= 0:
        weights = np.arange(1, adapters + 1) ** -value
        return weights / weights.sum()
    if name == "hot" and 0 < value < 1 and adapters > 1:
        return np.concatenate([[value], np.full(adapters - 1, (1 - value) / (adapters - 1))])
    raise ValueError(
        f"popularity {law!r} for {adapters} adapters: use slora:ALPHA > 0, zipf:S >= 0 or hot:SHARE in (0, 1)"
    )


@dataclass(frozen=True, eq=False)
class Turn:
    """One request of a session.

    ``tokens``: int64, what this turn appends to the session's prompt, behind the answer of the turn before;
    ``new_tokens``: how many are generated; ``think_s``: pause between the answer before (for the first turn: the
    session's arrival) and this request.
    """

    tokens: np.ndarray
    new_tokens: int
    think_s: float


@dataclass(frozen=True, eq=False)
class Session:
    """A conversation under one adapter (its index by popularity); a single request is a session of one turn."""

    arrival_s: float
    adapter: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Workload:
    """sessions       how many arrive
    rate           sessions per second; infinite: all at once
    adapters       how many there are to choose from
    popularity     law of the choice, see ``popularity``
    cv             coefficient of variation of the gaps between arrivals, which are gamma distributed; 1 is Poisson
    turns, user_tokens, new_tokens   uniform over ``[low, high)``: turns of a session; tokens that one turn brings
                   and asks for
    system_tokens  length of the system prompt that begins every session, the same for all
    think_s        mean of the exponential pause before the second and later turns
    vocab          tokens are uniform over ``[0, vocab)``: a repeated text would make any prefix cache look perfect
    """

    sessions: int
    rate: float
    adapters: int
    popularity: str = "zipf:1.0"
    cv: float = 1.0
    turns: tuple[int, int] = (1, 2)
    user_tokens: tuple[int, int] = (8, 513)
    new_tokens: tuple[int, int] = (8, 513)
    system_tokens: int = 0
    think_s: float = 0.0
    vocab: int = 32000
    seed: int = 0

    def generate(self) -> list[Session]:
        """All sessions in order of arrival."""
        rng = {name: np.random.default_rng([self.seed, i]) for i, name in enumerate(STREAMS)}
        adapters = rng["adapters"].choice(self.adapters, self.sessions, p=popularity(self.popularity, self.adapters))
        arrivals = self._arrivals(rng["arrivals"])
        turns = rng["turns"].integers(*self.turns, self.sessions)
        total = int(turns.sum())
        user = rng["prompts"].integers(*self.user_tokens, total)
        new = rng["answers"].integers(*self.new_tokens, total)
        think = rng["think"].exponential(self.think_s, total)
        system = rng["tokens"].integers(self.vocab, size=self.system_tokens)
        sessions, first = [], 0
        for arrival, adapter, count in zip(arrivals, adapters, turns, strict=True):
            parts = [rng["tokens"].integers(self.vocab, size=user[i]) for i in range(first, first + count)]
            parts[0] = np.concatenate([system, parts[0]])
            pauses = [0.0, *think[first + 1 : first + count]]
            made = (
                Turn(t, int(n), float(p)) for t, n, p in zip(parts, new[first : first + count], pauses, strict=True)
            )
            sessions.append(Session(float(arrival), int(adapter), tuple(made)))
            first += count
        return sessions

    def _arrivals(self, rng: np.random.Generator) -> np.ndarray:
        """Times of arrival in seconds, the first at 0; a gamma gap of shape 1 / cv² has that cv."""
        if math.isinf(self.rate):
            return np.zeros(self.sessions)
        gaps = rng.gamma(1 / self.cv**2, self.cv**2 / self.rate, self.sessions)
        return np.cumsum(gaps) - gaps[0]

    def asdict(self) -> dict[str, object]:
        """What a result has to say to be reproduced."""
        return dataclasses.asdict(self)
