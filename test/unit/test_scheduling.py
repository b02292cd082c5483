"""The order of the waiting queue: its rules one by one, and its promises under adversarial arrivals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_blocklora.scheduling.order import Waiting, order
from sglang_blocklora.scheduling.policy import AffinityPolicy, Ticket

NEVER = 10**9
LARGE = 10**9


def ordered(
    owner: list[int],
    *,
    quanta: list[int] | None = None,
    spent: list[int] | None = None,
    max_wait_steps: int = NEVER,
    **fields: list[float],
) -> list[int]:
    """``order`` of requests that are alike but for ``fields``."""
    count, owners = len(owner), max(owner) + 1
    columns = {name.name: np.zeros(count, np.int64) for name in dataclasses.fields(Waiting)}
    columns["cost_tokens"] += 100
    waiting = Waiting(**columns | {"owner": np.array(owner)} | {k: np.array(v) for k, v in fields.items()})
    result, _ = order(waiting, np.array(spent or [0] * owners), np.array(quanta or [LARGE] * owners), max_wait_steps)
    return result.tolist()


def test_equals_go_in_arrival_order() -> None:
    assert ordered([0, 1, 0, 2, 1]) == [0, 1, 2, 3, 4]


def test_longer_cached_prefixes_go_first() -> None:
    assert ordered([0, 0, 0], prefix_tokens=[10, 300, 200]) == [1, 2, 0]


def test_a_load_is_weighed_against_cached_tokens_and_shared_by_its_group() -> None:
    # 400 tokens of load for one request lose to a prefix of 0; shared by four they win over another's 300 for one
    assert ordered([0, 1], load_tokens=[400.0, 0.0]) == [1, 0]
    assert ordered([0, 1, 1, 1, 1], load_tokens=[300.0, 400.0, 400.0, 400.0, 400.0]) == [1, 2, 3, 4, 0]


def test_requests_that_will_find_more_in_the_cache_let_others_go_first() -> None:
    assert ordered([0, 0, 0], prefix_tokens=[40, 30, 20], deferred=[True, False, False]) == [1, 2, 0]
    assert ordered([0, 0], deferred=[True, False], overtaken_steps=[3, 0], max_wait_steps=3) == [0, 1]


def test_overdue_requests_of_a_turn_go_first_in_arrival_order_whatever_they_cost() -> None:
    overtaken, load = [0, 5, 4, 9], [0.0, 1e6, 0.0, 0.0]
    prefix = [500, 0, 500, 100]
    found = ordered([0, 1, 0, 0], prefix_tokens=prefix, load_tokens=load, overtaken_steps=overtaken, max_wait_steps=5)
    assert found == [1, 3, 0, 2]
    assert ordered([0, 0, 1], quanta=[100, 100], overtaken_steps=[9, 9, 0], max_wait_steps=5) == [0, 2, 1]


def test_priority_is_above_all() -> None:
    assert ordered([0, 0, 0], priority=[1, 0, 1], overtaken_steps=[9, 0, 0], max_wait_steps=5) == [1, 0, 2]


def test_owners_take_turns_of_a_quantum() -> None:
    # 100 tokens each: owner 0 may take two a round, owner 1 one
    assert ordered([0, 0, 0, 0, 1, 1], quanta=[200, 100]) == [0, 1, 4, 2, 3, 5]
    assert ordered([0, 0, 1, 1], quanta=[200, 200], spent=[200, 0]) == [2, 3, 0, 1]


@dataclass
class Request:
    """A waiting request of the model, and what the definition says about it."""

    ticket: Ticket
    adapter: str
    priority: int
    prefix: int
    cost: int
    deferred: bool
    overtaken: int = 0


@dataclass
class Queue:
    """A server reduced to its queue. ``refuse`` are adapters that do not fit beside what runs in this step."""

    policy: AffinityPolicy
    waiting: list[Request] = field(default_factory=list)

    def arrive(self, adapter: str, priority: int = 0, prefix: int = 0, cost: int = 1, deferred: bool = False) -> None:
        self.waiting.append(Request(self.policy.ticket(adapter), adapter, priority, prefix, cost, deferred))

    def step(
        self, capacity: int, refuse: set[str] = frozenset(), loads: dict[str, float] | None = None
    ) -> list[Request]:
        """Admit up to ``capacity`` requests in the policy's order, as upstream's loop does."""
        columns = [
            [r.ticket for r in self.waiting],
            [r.priority for r in self.waiting],
            [r.prefix for r in self.waiting],
            [(loads or {}).get(r.adapter, 0.0) for r in self.waiting],
            [r.cost for r in self.waiting],
            [r.deferred for r in self.waiting],
        ]
        self.waiting = [self.waiting[i] for i in self.policy.order(*columns)]
        admitted: list[Request] = []
        for request in self.waiting:
            if len(admitted) == capacity or self.policy.closed:
                break
            if request.adapter in refuse:
                self.policy.refused(request.ticket, will_fit=True)
            else:
                admitted.append(request)
        turns = dict(zip((r.ticket.arrival for r in self.waiting), self.policy.turns.tolist(), strict=True))
        self.waiting = [r for r in self.waiting if r not in admitted]
        for request in self.waiting:
            place = request.priority, turns[request.ticket.arrival]
            request.overtaken += any(
                other.ticket.arrival > request.ticket.arrival
                and (
                    (other.priority, turns[other.ticket.arrival]) >= place
                    or (other.adapter == request.adapter and other.priority >= request.priority)
                )
                for other in admitted
            )
        return admitted


PRIORITY = st.sampled_from([0, 2**63])  # SGLang's default for requests without one lies beyond int64
ARRIVAL = st.tuples(st.sampled_from("abc"), PRIORITY, st.integers(0, 2000), st.integers(1, 50), st.booleans())
STEP = st.tuples(st.lists(ARRIVAL, max_size=4), st.integers(0, 3), st.sets(st.sampled_from("abc"), max_size=2))


@settings(max_examples=150, deadline=None)
@given(
    bound=st.integers(0, 6),
    quantum=st.one_of(st.integers(1, 100), st.just(LARGE)),
    steps=st.lists(STEP, min_size=5, max_size=60),
)
def test_nobody_is_overtaken_more_often_than_the_bound(bound: int, quantum: int, steps) -> None:
    """With the large quantum there is one turn, and every later request that goes first counts."""
    queue = Queue(AffinityPolicy(bound, quantum, {"a": 3.0}))
    for arrivals, capacity, refuse in steps:
        for arrival in arrivals:
            queue.arrive(*arrival)
        queue.step(capacity, refuse, {"b": 500.0})
        assert all(request.overtaken <= bound for request in queue.waiting)


def test_the_bound_is_reached_by_a_flood_of_better_requests() -> None:
    """The property above is about something: without the bound the flood would go first for ever."""
    queue = Queue(AffinityPolicy(7, LARGE, {}))
    queue.arrive("cold")
    cold = queue.waiting[0]
    steps = 0
    while cold in queue.waiting:
        queue.arrive("hot", prefix=1000)
        queue.step(1, loads={"cold": 5000.0})
        steps += 1
    assert (steps, cold.overtaken) == (8, 7)


def test_an_overdue_request_that_can_never_fit_stops_nobody() -> None:
    policy = AffinityPolicy(0, LARGE, {})
    policy.refused(policy.ticket("a"), will_fit=False)
    assert not policy.closed
    policy.refused(policy.ticket("a"), will_fit=True)
    assert policy.closed


@settings(max_examples=60, deadline=None)
@given(
    weights=st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 2.0, 4.0]) for name in "abc"}),
    quantum=st.integers(20, 200),
    capacities=st.lists(st.integers(0, 12), min_size=10, max_size=60),
    data=st.randoms(use_true_random=False),
)
def test_owners_that_always_wait_get_their_shares(weights, quantum: int, capacities: list[int], data) -> None:
    """Deficit round robin's law: rounds served differ by less than one, plus what the largest request overdraws."""
    queue = Queue(AffinityPolicy(NEVER, quantum, weights))
    served = dict.fromkeys("abc", 0)
    largest = 30
    for capacity in capacities:
        for name in "abc":
            while sum(r.adapter == name for r in queue.waiting) <= 12:
                queue.arrive(name, prefix=2000 if name == "a" else data.randint(0, 100), cost=data.randint(1, largest))
        for request in queue.step(capacity, loads={"c": 300.0}):
            served[request.adapter] += request.cost
        quanta = {name: round(weights[name] * quantum) for name in "abc"}
        rounds = {name: served[name] / quanta[name] for name in "abc"}
        for name in "abc":
            assert rounds[name] - min(rounds.values()) < 1 + largest / quanta[name]


def test_what_was_taken_while_nobody_else_waited_is_not_held_against_an_owner() -> None:
    queue = Queue(AffinityPolicy(NEVER, 100, {}))
    for _ in range(50):
        queue.arrive("hot", cost=100)
    queue.step(50)
    queue.arrive("hot", cost=100)
    queue.arrive("cold", cost=100)
    assert [r.adapter for r in queue.step(1)] == ["hot"]


def test_who_comes_late_has_no_credit() -> None:
    queue = Queue(AffinityPolicy(NEVER, 100, {}))
    for name in ["a"] * 60 + ["b"] * 60:
        queue.arrive(name, cost=100)
    for _ in range(10):
        queue.step(8)
    for _ in range(10):
        queue.arrive("late", cost=100)
    assert sorted(r.adapter for r in queue.step(9)) == ["a"] * 3 + ["b"] * 3 + ["late"] * 3


def test_a_debt_is_worked_off_while_an_owner_is_away() -> None:
    queue = Queue(AffinityPolicy(NEVER, 100, {}))
    for name in ["a", "b", "b"]:
        queue.arrive(name, cost=1000 if name == "a" else 100)
    assert [r.adapter for r in queue.step(2)] == ["a", "b"]  # a overdrew its quantum by 900
    for _ in range(20):
        queue.arrive("b", cost=100)
    for _ in range(12):
        queue.step(1)
    queue.arrive("a", cost=100)
    assert sum(r.adapter == "a" for r in queue.step(2)) == 1


def test_a_retracted_request_keeps_its_place() -> None:
    queue = Queue(AffinityPolicy(NEVER, LARGE, {}))
    queue.arrive("a")
    (first,) = queue.step(1)
    queue.arrive("a")
    queue.waiting.append(first)
    assert queue.step(1) == [first]


@settings(max_examples=50, deadline=None)
@given(arrivals=st.lists(ARRIVAL, min_size=1, max_size=12), data=st.data())
def test_the_order_does_not_depend_on_where_requests_stand_in_the_queue(arrivals, data) -> None:
    def run(shuffle: bool) -> list[int]:
        queue = Queue(AffinityPolicy(3, 60, {}))
        for arrival in arrivals:
            queue.arrive(*arrival)
        if shuffle:
            queue.waiting = data.draw(st.permutations(queue.waiting))
        return [r.ticket.arrival for r in queue.step(len(arrivals), loads={"b": 40.0})]

    assert run(shuffle=False) == run(shuffle=True)


def test_adapters_that_came_and_went_are_forgotten() -> None:
    """Adapters are loaded under new names for ever, and the base model never stops waiting."""
    policy = AffinityPolicy(max_wait_steps=4, quantum_tokens=10, weights={})
    base = [policy.ticket(None) for _ in range(3)]
    for number in range(10_000):
        passing = policy.ticket(f"a{number}")
        waiting = [*base, passing]
        policy.order(waiting, [0] * 4, [0] * 4, [0.0] * 4, [25] * 4, [False] * 4)
        base = [*base[1:], policy.ticket(None)]
    assert len(policy._spent) < 10
