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


@dataclass(slots=True)
class Ticket:
    """A request's place in the queue, which it keeps when it is retracted and waits again.

    owner            name of its adapter, None for the base model
    arrival          its number among all requests
    arrival_step     the step in which it was first seen
    overtaken_steps  steps in which it was overtaken
    last_step        the last step in which it waited
    """

    owner: str | None
    arrival: int
    arrival_step: int
    overtaken_steps: int = 0
    last_step: int = -1


class AffinityPolicy:
    """Orders the waiting queue, step after step. Only its calls count, so all TP ranks decide alike.

    A request is overtaken in a step if one that arrived later, of no higher priority, leaves the queue before it: one
    of the same adapter, or one of another whose turn was not earlier.

    turns           of the requests of this step, in the order that was given
    closed          in this step nobody behind an overdue request may go any more
    max_wait_steps  steps for which a request may be overtaken
    quantum_tokens  tokens that an owner of weight 1 may take while others wait, before it is their turn
    weights         shares of adapters by name; 1 where none is given
    """

    def __init__(self, max_wait_steps: int, quantum_tokens: int, weights: Mapping[str, float]) -> None:
        self.max_wait_steps = max_wait_steps
        self.steps = 0
        self.closed = False
        self.turns: Ints = np.zeros(0, np.int64)
        self._quantum_tokens = quantum_tokens
        self._weights = weights
        self._spent: dict[str | None, int] = {}  # of owners that owe; the others are forgotten
        self._arrivals = 0
        self._last: tuple[list[Ticket], list[str | None], Waiting, Ints] | None = None

    def ticket(self, adapter: str | None) -> Ticket:
        """The place of a request that has just arrived; ``adapter`` None is the base model."""
        self._arrivals += 1
        return Ticket(adapter, self._arrivals, self.steps)

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
        self.closed = False
        for ticket in tickets:
            ticket.last_step = self.steps
        self._settle()
        by_arrival = np.argsort(_column(tickets, "arrival"))
        owners = list(dict.fromkeys(ticket.owner for ticket in tickets))
        places = {owner: place for place, owner in enumerate(owners)}
        levels = {value: level for level, value in enumerate(sorted(set(priority)))}
        priorities = np.fromiter(map(levels.__getitem__, priority), np.int64, len(tickets))[by_arrival]
        waiting = Waiting(
            np.fromiter((places[ticket.owner] for ticket in tickets), np.int64, len(tickets))[by_arrival],
            priorities,
            np.asarray(prefix_tokens, np.int64)[by_arrival],
            np.asarray(load_tokens, np.float64)[by_arrival],
            np.asarray(cost_tokens, np.int64)[by_arrival],
            self.steps - _column(tickets, "arrival_step")[by_arrival],
            np.asarray(deferred, bool)[by_arrival],
            _column(tickets, "overtaken_steps")[by_arrival],
        )
        spent = np.array([self._spent.get(owner, 0) for owner in owners], np.int64)
        quanta = np.array([self._quantum(owner) for owner in owners], np.int64)
        chosen, turn = order(waiting, spent, quanta, self.max_wait_steps)
        self._last = [tickets[i] for i in by_arrival.tolist()], owners, waiting, turn
        self.turns = turn[chosen]
        return by_arrival[chosen]

    def refused(self, ticket: Ticket, will_fit: bool) -> None:
        """A request's adapter does not fit now. If the request is overdue, all behind it wait until it does.

        will_fit  whether it does once running requests have ended; otherwise waiting changes nothing, and others go on
        """
        self.closed = self.closed or (will_fit and ticket.overtaken_steps >= self.max_wait_steps)

    def _settle(self) -> None:
        """Account for the last step: who left, who was overtaken, whose rounds have passed."""
        if self._last is None:
            return
        tickets, owners, waiting, turn = self._last
        gone = _column(tickets, "last_step") != self.steps
        for i in np.flatnonzero(_overtaken(gone, waiting, turn)):
            tickets[i].overtaken_steps += 1
        for owner, cost in zip(waiting.owner[gone].tolist(), waiting.cost_tokens[gone].tolist(), strict=True):
            self._spent[owners[owner]] = self._spent.get(owners[owner], 0) + cost
        left_behind = [owners[owner] for owner in np.unique(waiting.owner[~gone]).tolist()]
        # Where nobody was left behind, everyone had a turn: nobody owes anything.
        rounds = min((self._spent.get(owner, 0) // self._quantum(owner) for owner in left_behind), default=None)
        self._spent = {
            owner: rest
            for owner, spent in self._spent.items()
            if rounds is not None and (rest := spent - rounds * self._quantum(owner)) > 0
        }

    def _quantum(self, owner: str | None) -> int:
        """Tokens that an owner may take in a round."""
        weight = 1.0 if owner is None else self._weights.get(owner, 1.0)
        return max(round(weight * self._quantum_tokens), 1)


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
