"""Workloads as the simulated tree sees them: sessions whose prompts are pages of ``PAGE_TOKENS`` tokens."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from benchmark.serving.workload import Session, Turn
from research.simulation.costs import PAGE_TOKENS

_MIX = np.random.default_rng(0).integers(1, 2**62, PAGE_TOKENS, dtype=np.uint64) | np.uint64(1)
ANSWER_BIT = 1 << 31  # tells pages of answers from pages of prompts, whose keys stay below


def pages(tokens: int) -> int:
    """``tokens`` in whole pages."""
    return -(-tokens // PAGE_TOKENS)


def page_keys(tokens: np.ndarray) -> array[int]:
    """One key of 31 bits a page: equal pages of tokens have equal keys. The last page is padded."""
    padded = np.full(pages(len(tokens)) * PAGE_TOKENS, -1, dtype=np.int64)
    padded[: len(tokens)] = tokens
    mixed = (padded.reshape(-1, PAGE_TOKENS).astype(np.uint64) * _MIX).sum(axis=1, dtype=np.uint64)
    return array("q", (mixed >> np.uint64(33)).astype(np.int64).tolist())


INVOCATION = np.ones(PAGE_TOKENS, dtype=np.int64)  # a page of its own


@dataclass(frozen=True)
class Judged:
    """One context after the other, each asked of all adapters at once: context, ``INVOCATION``, each a question.

    sessions        requests altogether, ``adapters`` of each context
    rate            contexts a second, gaps exponential
    context_tokens, question_tokens, new_tokens   uniform over ``[low, high)``, the first two rounded up to whole pages
    """

    sessions: int
    rate: float
    adapters: int
    context_tokens: tuple[int, int]
    question_tokens: tuple[int, int] = (16, 129)
    new_tokens: tuple[int, int] = (16, 65)
    seed: int = 0

    def generate(self) -> list[Session]:
        rng = np.random.default_rng(self.seed)

        def text(length: tuple[int, int]) -> np.ndarray:
            return rng.integers(2, 32000, pages(int(rng.integers(*length))) * PAGE_TOKENS)

        contexts = -(-self.sessions // self.adapters)
        arrivals = np.cumsum(rng.exponential(1 / self.rate, contexts))
        sessions = []
        for arrival in arrivals:
            context = text(self.context_tokens)
            for adapter in range(self.adapters):
                prompt = np.concatenate([context, INVOCATION, text(self.question_tokens)])
                turn = Turn(prompt, int(rng.integers(*self.new_tokens)), 0.0)
                sessions.append(Session(float(arrival), adapter, (turn,)))
        return sessions


@dataclass
class Conversation:
    """A session being played. ``history`` is what its next prompt begins with."""

    index: int
    session: Session
    history: array[int] = field(default_factory=lambda: array("q"))
    asked: int = 0

    def ask(self) -> tuple[array[int], Turn]:
        """The prompt of the next turn (in pages) and the turn."""
        turn = self.session.turns[self.asked]
        self.asked += 1
        self.history = self.history + page_keys(turn.tokens)
        return self.history, turn

    def answer_key(self, page: int) -> int:
        """Key of the ``page``-th page of the answer to the last question."""
        mixed = (self.index << 32 | self.asked << 16 | page) * 0x9E3779B97F4A7C15 % (1 << 64)  # Fibonacci hashing
        return ANSWER_BIT | mixed >> 33

    def answered(self, answer: array[int]) -> Turn | None:
        """Take an answer into the history; the turn that follows, if any."""
        self.history = self.history + answer
        return self.session.turns[self.asked] if self.asked < len(self.session.turns) else None
