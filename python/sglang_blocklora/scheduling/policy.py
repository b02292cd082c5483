"""What the order of the waiting queue remembers from step to step: arrivals, overtakings, tokens spent.

A step is one call of ``AffinityPolicy.order``, after which requests may leave the queue. Nothing here reads a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang_blocklora.scheduling.order import Ints, Waiting, order


@dataclass(slots=True)
class Ticket:
    """A request's place: it keeps it when it is retracted and waits again.

    owner            index of its adapter, or of the base model
    arrival          its number among all requests
    arrival_step     the step in which it was first seen
    overtaken_steps  steps in which a request that arrived later, of no higher priority, left the queue before it
    last_step        the last step in which it waited
    """

    owner: int
    arrival: int
    arrival_step: int
    overtaken_steps: int = 0
    last_step: int = -1


class AffinityPolicy:
    """Orders a waiting queue. Decisions follow from the calls alone, so all TP ranks decide alike.

    held            in this step nobody behind an overdue request may go any more
    max_wait_steps  steps for which a request may be overtaken
    quantum_tokens  tokens that an owner of weight 1 may take while others wait, before it is their turn
    weights         shares of adapters by name; 1 where none is given
    """

    def __init__(self, max_wait_steps: int, quantum_tokens: int, weights: Mapping[str, float]) -> None:
        self.max_wait_steps = max_wait_steps
        self.steps = 0
        self.held = False
        self._quantum_tokens = quantum_tokens
        self._weights = weights
        self._owners: dict[str | None, int] = {}
        self._spent: Ints = np.zeros(0, np.int64)
        self._quanta: Ints = np.zeros(0, np.int64)
        self._arrivals = 0
        self._last: tuple[list[Ticket], Ints, Ints] = [], np.zeros(0, np.int64), np.zeros(0, np.int64)

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
    ) -> npt.NDArray[np.int64]:
        """Begin a step: indices of the waiting requests in the order of admission. One entry a request.

        Requests of the last step that are missing now were admitted: they are charged to their owners and count as
        having overtaken whom they left behind. An aborted one cannot be told from them.
        """
        self.steps += 1
        self.held = False
        for ticket in tickets:
            ticket.last_step = self.steps
        self._settle()
        arrival = _array(ticket.arrival for ticket in tickets)
        by_arrival = np.argsort(arrival)
        owner = _array(ticket.owner for ticket in tickets)[by_arrival]
        priorities = np.asarray(priority, np.int64)[by_arrival]
        costs = np.asarray(cost_tokens, np.int64)[by_arrival]
        waiting = Waiting(
            owner,
            priorities,
            np.asarray(prefix_tokens, np.int64)[by_arrival],
            np.asarray(load_tokens, np.float64)[by_arrival],
            costs,
            self.steps - _array(ticket.arrival_step for ticket in tickets)[by_arrival],
            _array(ticket.overtaken_steps for ticket in tickets)[by_arrival],
        )
        self._last = [tickets[i] for i in by_arrival.tolist()], priorities, costs
        return by_arrival[order(waiting, self._spent, self._quanta, self.max_wait_steps)]

    def refused(self, ticket: Ticket, anything_runs: bool) -> None:
        """A request does not fit beside what runs. If it is overdue, all behind it wait until it does.

        Where nothing runs, waiting would change nothing: the others go on.
        """
        self.held = self.held or (anything_runs and ticket.overtaken_steps >= self.max_wait_steps)

    def _settle(self) -> None:
        """Account for the last step: who left, who was overtaken, whose rounds have passed."""
        tickets, priority, costs = self._last
        gone = np.fromiter((ticket.last_step != self.steps for ticket in tickets), bool, len(tickets))
        owner = _array(ticket.owner for ticket in tickets)
        np.add.at(self._spent, owner[gone], costs[gone])
        for i in np.flatnonzero(_overtaken(gone, priority)):
            tickets[i].overtaken_steps += 1
        left_behind = np.unique(owner[~gone])
        if len(left_behind) == 0:
            self._spent[:] = 0  # everyone had a turn: nobody owes anything
            return
        rounds = (self._spent[left_behind] // self._quanta[left_behind]).min()
        self._spent = np.maximum(self._spent - rounds * self._quanta, 0)


def _array(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int64)


def _overtaken(gone: npt.NDArray[np.bool_], priority: Ints) -> npt.NDArray[np.bool_]:
    """Which of the requests, in arrival order, stayed while a later one of the same or a later priority left."""
    index = np.arange(len(gone))
    levels, level = np.unique(priority, return_inverse=True)
    latest = np.full(len(levels), -1)
    np.maximum.at(latest, level[gone], index[gone])
    latest = np.maximum.accumulate(latest[::-1])[::-1]
    return ~gone & (index < latest[level])
