"""Sorts the waiting queue: a pure function of plain arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# What a step of waiting is worth, in prompt tokens saved.
AGE_TOKENS_PER_STEP = 1.0
# Loading one slot from host memory or from disk, in prompt tokens computed. A slot has as many bytes as a token's KV.
HOST_LOAD_TOKENS_PER_SLOT = 0.1
DISK_LOAD_TOKENS_PER_SLOT = 1.0
# Reading one slot of an adapter in every decode step, once for all requests of the batch that have it: 128 KiB at
# 2.3 TB/s for about 250 steps, against 33 us for a prompt token (Llama-3.1-8B on an H100).
BATCH_TOKENS_PER_SLOT = 0.5


@dataclass(frozen=True)
class Waiting:
    """The waiting requests, one array entry each, in arrival order. An owner is an adapter, or the base model.

    owner            index into the owners' ``spent`` and ``quanta``
    priority         smaller goes first
    prefix_tokens    prompt tokens that are cached and need not be computed
    load_tokens      cost of bringing the adapter in, in computed prompt tokens: into the arena where it is not
                     resident, and into the batch where no running request has it
    cost_tokens      what admitting it charges to its owner
    age_steps        scheduler steps since it arrived
    deferred         another request, which goes before it, will leave part of its prompt in the cache
    overtaken_steps  steps in which it was overtaken: see ``AffinityPolicy``
    """

    owner: Ints
    priority: Ints
    prefix_tokens: Ints
    load_tokens: Floats
    cost_tokens: Ints
    age_steps: Ints
    deferred: Bools
    overtaken_steps: Ints


def score(waiting: Waiting) -> Floats:
    """Tokens that admitting each request now saves: larger goes first. All requests of an adapter share one load."""
    group_size = np.bincount(waiting.owner)[waiting.owner]
    return waiting.prefix_tokens - waiting.load_tokens / group_size + AGE_TOKENS_PER_STEP * waiting.age_steps


def order(waiting: Waiting, spent: Ints, quanta: Ints, max_wait_steps: int) -> tuple[Ints, Ints]:
    """Indices of ``waiting`` in the order of admission, and each request's turn.

    By priority, then turn, then requests overtaken for ``max_wait_steps`` in arrival order, then score, then arrival.
    Turns are deficit round robin's, laid out ahead: a request's is the round in which its owner, who has spent
    ``spent`` tokens and gets ``quanta`` tokens a round, can pay for it after its own requests that go before it.
    """
    overdue = waiting.overtaken_steps >= max_wait_steps
    value = np.where(waiting.deferred, -np.inf, score(waiting))
    value[overdue] = np.inf
    by_value = np.lexsort((-value, waiting.priority))  # stable: arrival order among equals
    by_owner = by_value[np.argsort(waiting.owner[by_value], kind="stable")]
    owner, cost = waiting.owner[by_owner], waiting.cost_tokens[by_owner]
    before = np.cumsum(cost) - cost
    first_of_owner = np.flatnonzero(np.diff(owner, prepend=-1))
    before -= np.repeat(before[first_of_owner], np.diff(first_of_owner, append=len(owner)))
    turn = np.empty_like(before)
    turn[by_owner] = (spent[owner] + before) // quanta[owner]
    return by_value[np.lexsort((turn[by_value], waiting.priority[by_value]))], turn
