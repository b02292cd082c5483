"""Remembers from step to step what the order of the waiting queue needs: arrivals, overtakings, tokens spent.

A step is one call of ``AffinityPolicy.order``, after which requests may leave the queue. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from sglang_blocklora.scheduling.order import Bools, Ints, Waiting, order

# A round of fairness, in prefill chunks: with fewer, an adapter's bursts wait long for little gain (docs/scheduler.md).
QUANTUM_CHUNKS = 16


@dataclass(slots=True)
class Ticket:
    """A request's place in the queue, which it keeps when it is retracted and waits again.

    owner            index of its adapter, or of the base model
    arrival          its number among all requests
    arrival_step     the step in which it was first seen
    overtaken_steps  steps in which it was overtaken
    last_step        the last step in which it waited
    """

    owner: int
    arrival: int
    arrival_step: int
    overtaken_steps: int = 0
    last_step: int = -1


class AffinityPolicy:
    """Orders the waiting queue, step after step. Only its calls count, so all TP ranks decide alike.

    A request is overtaken in a step if one that arrived later, of no higher priority, leaves the queue before it: one
    of the same adapter, or one of another whose turn was not earlier.

    turns           of the requests of this step, in the order that was given
    held            in this step nobody behind an overdue request may go any more
    max_wait_steps  steps for which a request may be overtaken
    quantum_tokens  tokens that an owner of weight 1 may take while others wait, before it is their turn
    weights         shares of adapters by name; 1 where none is given
    """

    def __init__(self, max_wait_steps: int, quantum_tokens: int, weights: Mapping[str, float]) -> None:
        self.max_wait_steps = max_wait_steps
        self.steps = 0
        self.held = False
        self.turns: Ints = np.zeros(0, np.int64)
        self._quantum_tokens = quantum_tokens
        self._weights = weights
        self._owners: dict[str | None, int] = {}
        self._spent: Ints = np.zeros(0, np.int64)
        self._quanta: Ints = np.zeros(0, np.int64)
        self._arrivals = 0
        self._last: tuple[list[Ticket], Waiting, Ints] | None = None

    def ticket(self, adapter: str | None) -> Ticket:
        """The place of a request that has just arrived; ``adapter`` None is the base model."""
        owner = self._owners.get(adapter)
        if owner is None:
            owner = self._owners[adapter] = len(self._owners)
            weight = 1.0 if adapter is None else self._weights.get(adapter, 1.0)
            self._spent = np.append(self._spent, 0)
            self._quanta = np.append(self._quanta, max(round(weight * self._quantum_tokens), 1))
        self._arrivals += 1
        return Ticket(owner, self._arrivals, self.steps)

    def order(
        self,
        tickets: Sequence[Ticket],
        priority: Sequence[int],
        prefix_tokens: Sequence[int],
        load_tokens: Sequence[float],
        cost_tokens: Sequence[int],
        deferred: Sequence[bool],
    ) -> npt.NDArray[np.int64]:
        """Begin a step: indices of the waiting requests in the order of admission. One entry a request.

        priority  smaller goes first, of any size; the others are as in ``Waiting``

        Requests of the last step that are missing now were admitted: they are charged to their owners and count as
        having overtaken whom they left behind. An aborted one cannot be told from them.
        """
        self.steps += 1
        self.held = False
        for ticket in tickets:
            ticket.last_step = self.steps
        self._settle()
        by_arrival = np.argsort(_column(tickets, "arrival"))
        levels = {value: level for level, value in enumerate(sorted(set(priority)))}
        priorities = np.fromiter(map(levels.__getitem__, priority), np.int64, len(tickets))[by_arrival]
        waiting = Waiting(
            _column(tickets, "owner")[by_arrival],
            priorities,
            np.asarray(prefix_tokens, np.int64)[by_arrival],
            np.asarray(load_tokens, np.float64)[by_arrival],
            np.asarray(cost_tokens, np.int64)[by_arrival],
            self.steps - _column(tickets, "arrival_step")[by_arrival],
            np.asarray(deferred, bool)[by_arrival],
            _column(tickets, "overtaken_steps")[by_arrival],
        )
        chosen, turn = order(waiting, self._spent, self._quanta, self.max_wait_steps)
        self._last = [tickets[i] for i in by_arrival.tolist()], waiting, turn
        self.turns = turn[chosen]
        return by_arrival[chosen]

    def refused(self, ticket: Ticket, will_fit: bool) -> None:
        """A request's adapter does not fit now. If the request is overdue, all behind it wait until it does.

        will_fit  whether it does once running requests have ended; otherwise waiting changes nothing, and others go on
        """
        self.held = self.held or (will_fit and ticket.overtaken_steps >= self.max_wait_steps)

    def _settle(self) -> None:
        """Account for the last step: who left, who was overtaken, whose rounds have passed."""
        if self._last is None:
            return
        tickets, waiting, turn = self._last
        gone = _column(tickets, "last_step") != self.steps
        for i in np.flatnonzero(_overtaken(gone, waiting, turn)):
            tickets[i].overtaken_steps += 1
        np.add.at(self._spent, waiting.owner[gone], waiting.cost_tokens[gone])
        left_behind = np.unique(waiting.owner[~gone])
        if len(left_behind) == 0:
            self._spent[:] = 0  # everyone had a turn: nobody owes anything
            return
        rounds = (self._spent[left_behind] // self._quanta[left_behind]).min()
        self._spent = np.maximum(self._spent - rounds * self._quanta, 0)


def _column(tickets: Sequence[Ticket], name: str) -> Ints:
    return np.fromiter(map(attrgetter(name), tickets), np.int64, len(tickets))


def _overtaken(gone: Bools, waiting: Waiting, turn: Ints) -> Bools:
    """Which of the requests, in arrival order, stayed while one left that overtook them."""
    among_all = np.zeros_like(turn)
    place = waiting.priority * (turn.max(initial=0) + 1) + turn
    latest = np.maximum(_latest(gone, waiting.owner, waiting.priority), _latest(gone, among_all, place))
    return ~gone & (np.arange(len(gone)) < latest)


def _latest(gone: Bools, group: Ints, level: Ints) -> Ints:
    """For each request the last one that left of its group and of its level or a later one; -1 where none did."""
    groups, group = np.unique(group, return_inverse=True)
    levels, level = np.unique(level, return_inverse=True)
    latest = np.full((len(groups), len(levels)), -1)
    np.maximum.at(latest, (group[gone], level[gone]), np.flatnonzero(gone))
    return np.maximum.accumulate(latest[:, ::-1], axis=1)[:, ::-1][group, level]
