"""Quotas against a log of everything that was let in, and the tenants' file: what it gives and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sglang_blocklora.tenancy.buckets import Bucket
from sglang_blocklora.tenancy.file import Limits, Tenant, Tenants, key_hash, read, tenants_file
from sglang_blocklora.tenancy.quotas import KEPT_ACCOUNTS, Charge, NeverFits, QuotaExceeded, Quotas

# Buckets.


@given(
    st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=40), st.integers(0, 10**6)
)
def test_over_any_time_no_more_begins_than_the_quota_and_what_drained(
    quota: int, tries: list[tuple[float, int]], start: int
) -> None:
    bucket, now, log = Bucket(), float(start), []
    for pause, amount in tries:
        now += pause
        if bucket.wait_s(quota, now) == 0:
            bucket.charge(amount, quota, now)
            log.append((now, amount))
    for i, (first, _) in enumerate(log):
        for j, (last, _) in enumerate(log[i:], start=i):  # the last one may go beyond
            begun = sum(amount for _, amount in log[i:j])
            assert begun <= quota * (1 + (last - first) / 60) + 1e-3


@given(st.integers(1, 100_000), st.lists(st.integers(1, 5000), min_size=1, max_size=5), st.floats(0, 1e6))
def test_the_wait_is_the_smallest_whole_number_of_seconds_that_is_long_enough(
    quota: int, amounts: list[int], now: float
) -> None:
    bucket = Bucket()
    for amount in amounts:
        bucket.charge(amount, quota, now)
    wait = bucket.wait_s(quota, now)
    assert (wait > 0) == (sum(amounts) + 1 - quota > 1e-6)
    assert bucket.wait_s(quota, now + wait) == 0
    if wait > 1:
        early = Bucket()
        early.charge(sum(amounts), quota, now)
        assert early.wait_s(quota, now + wait - 1) >= 1


# Quotas.


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tenants(**more: Any) -> Tenants:
    limits = Limits(requests_per_minute=60, tokens_per_minute=600, concurrent_requests=4)
    sql = {"name": "sql*", "limits": {"requests_per_minute": 6, "concurrent_requests": 2, "share_of_slots": 0.5}}
    data = {"tenants": [{"name": "acme", "keys": ["k"], "limits": limits}], "adapters": [sql]} | more
    return msgspec.convert(msgspec.to_builtins(data), Tenants)


def test_a_refusal_names_owner_limit_and_seconds_and_charges_nobody() -> None:
    clock = Clock()
    quotas = Quotas(tenants(), 100, clock)
    (acme,) = quotas.tenants.tenants
    for _ in range(6):
        quotas.begin(acme, {"sql": 1}).end()
    with pytest.raises(QuotaExceeded, match="adapter 'sql' is at its limit of 6 requests per minute") as error:
        quotas.begin(acme, {"sql": 1, "other": 1})
    assert (error.value.retry_after_s, error.value.limit) == (10, "requests_per_minute")
    clock.now += 9
    with pytest.raises(QuotaExceeded):
        quotas.begin(None, {"sql": 1})  # the operator meets an adapter's limits too
    clock.now += 1
    quotas.begin(None, {"sql": 1}).end()
    quotas.begin(acme, {"sql2": 1}).end()  # each adapter that matches has limits of its own
    assert quotas.running == {}


def test_tokens_are_charged_as_they_come_and_waited_for_afterwards() -> None:
    clock = Clock()
    quotas = Quotas(tenants(), 100, clock)
    (acme,) = quotas.tenants.tenants
    charge = quotas.begin(acme, {None: 1})
    charge.tokens(None, 500)
    quotas.begin(acme, {None: 1}).end()
    charge.end()
    charge.tokens(None, 700)  # generated until the scheduler heard that its client is gone
    with pytest.raises(QuotaExceeded, match="tenant 'acme' is at its limit of 600 tokens per minute") as error:
        quotas.begin(acme, {None: 1})
    assert error.value.retry_after_s == 61  # (1200 + 1 - 600) / 10 a second
    clock.now += 61
    quotas.begin(acme, {None: 1}).end()


def test_what_is_larger_than_a_limit_on_concurrent_requests_is_told_so() -> None:
    quotas = Quotas(tenants(), 100, Clock())
    (acme,) = quotas.tenants.tenants
    with pytest.raises(NeverFits, match="asks for 5 answers at once, and tenant 'acme' may have 4 concurrent"):
        quotas.begin(acme, {None: 5})
    with pytest.raises(NeverFits, match="adapter 'sql' may have 2"):
        quotas.begin(acme, {"sql": 3})
    assert quotas.running == {}


def test_slots_are_reserved_to_the_end_and_one_request_may_go_beyond_a_share() -> None:
    quotas = Quotas(tenants(adapters=[{"name": "sql", "limits": {"share_of_slots": 0.3}}]), 100, Clock())
    first = quotas.begin(None, {"sql": 1})
    first.reserve("sql", 29)
    second = quotas.begin(None, {"sql": 1})
    second.reserve("sql", 50)
    second.reserve(None, 50)  # the base model's has no limit
    with pytest.raises(QuotaExceeded, match=r"adapter 'sql' is at its limit of 0\.3 share of slots") as error:
        quotas.begin(None, {"sql": 1})
    assert error.value.retry_after_s == 1
    second.end()
    second.reserve("sql", 50)
    quotas.begin(None, {"sql": 1}).end()
    assert quotas.running == {"adapter 'sql'": (1, 29)}
    first.end()
    assert quotas.running == {}


def test_other_limits_hold_at_once_and_what_was_used_counts_on() -> None:
    quotas = Quotas(tenants(), 100, Clock())
    (acme,) = quotas.tenants.tenants
    first = quotas.begin(acme, {None: 4})
    fewer = Limits(requests_per_minute=5)
    quotas.tenants = tenants(tenants=[{"name": "acme", "keys": ["k"], "limits": fewer}])
    (acme,) = quotas.tenants.tenants
    quotas.begin(acme, {None: 1}).end()  # 4 of 60 were used; 5 of 5 are now
    with pytest.raises(QuotaExceeded, match="5 requests per minute"):
        quotas.begin(acme, {None: 1})
    first.end()
    assert quotas.running == {}


def test_names_that_nobody_has_do_not_stay() -> None:
    clock = Clock()
    every = [{"name": "*", "limits": {"requests_per_minute": 60}}]
    quotas = Quotas(tenants(adapters=every), 100, clock)
    for i in range(5 * KEPT_ACCOUNTS):
        clock.now += 1
        quotas.begin(None, {f"n{i}": 1}).end()
    assert len(quotas._accounts) <= 2 * KEPT_ACCOUNTS


ADAPTERS = (None, "sql", "sql2", "free")


class QuotaMachine(RuleBasedStateMachine):
    """Requests of two tenants and the operator begin, use tokens and end in any order, told once or more often."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        limits = Limits(requests_per_minute=30, tokens_per_minute=300, concurrent_requests=3)
        data = tenants()
        self.acme = Tenant(name="acme", keys=("k",), limits=limits)
        self.quotas = Quotas(Tenants(tenants=(self.acme,), adapters=data.adapters), 100, self.clock)
        self.running: list[tuple[Charge, Tenant | None, Counter[str | None]]] = []
        self.slots: dict[Charge, Counter[str | None]] = {}
        self.ended: list[Charge] = []
        self.begun: list[tuple[float, Tenant | None, Counter[str | None]]] = []
        self.refused_until = 0.0

    @rule(
        by_tenant=st.booleans(),
        names=st.lists(st.sampled_from(ADAPTERS), min_size=1, max_size=4),
    )
    def begin(self, by_tenant: bool, names: list[str | None]) -> None:
        tenant, counts = (self.acme if by_tenant else None), Counter(names)
        there = self.expected()
        try:
            charge = self.quotas.begin(tenant, counts)
        except (QuotaExceeded, NeverFits):
            assert self.quotas.running == there, "a refusal takes nothing"
            return
        self.running.append((charge, tenant, counts))
        self.begun.append((self.clock.now, tenant, counts))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(0, 200))
    def use(self, data: st.DataObject, tokens: int) -> None:
        charge, _, counts = data.draw(st.sampled_from(self.running))
        name = data.draw(st.sampled_from(sorted(counts, key=str)))
        charge.tokens(name, tokens)
        charge.reserve(name, tokens)
        self.slots.setdefault(charge, Counter())[name] += tokens

    @precondition(lambda self: self.running)
    @rule(data=st.data(), times=st.integers(1, 3))
    def end(self, data: st.DataObject, times: int) -> None:
        """By an answer, an abort, or a client that went away: perhaps more than one of these tells it."""
        i = data.draw(st.integers(0, len(self.running) - 1))
        charge, _, _ = self.running.pop(i)
        for _ in range(times):
            charge.end()
        self.ended.append(charge)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def late(self, data: st.DataObject) -> None:
        """The scheduler tells of tokens after the end."""
        charge = data.draw(st.sampled_from(self.ended))
        charge.tokens("sql", 1)
        charge.reserve("sql", 1)
        charge.end()

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def expected(self) -> dict[str, tuple[int, int]]:
        running: Counter[str] = Counter()
        slots: Counter[str] = Counter()
        for charge, tenant, counts in self.running:
            for found, own in ((running, counts), (slots, self.slots.get(charge, Counter()))):
                if tenant is not None:
                    found["tenant 'acme'"] += own.total()
                for name in ("sql", "sql2"):
                    found[f"adapter {name!r}"] += own[name]
        return {owner: (running[owner], slots[owner]) for owner in running | slots}

    @invariant()
    def what_runs_is_counted(self) -> None:
        assert self.quotas.running == self.expected()

    @invariant()
    def limits_hold(self) -> None:
        running = self.expected()
        assert running.get("tenant 'acme'", (0, 0))[0] <= 3
        assert max(running.get(f"adapter '{name}'", (0, 0))[0] for name in ("sql", "sql2")) <= 2
        lately = [counts["sql"] for at, _, counts in self.begun if at > self.clock.now - 60]
        assert sum(lately) <= 2 * 6 + 2  # the quota, what drained, and what one request was beyond


TestQuotaMachine = QuotaMachine.TestCase


# The file.


def written(folder: Path, data: Any, name: str = "tenants.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


TOML = """
[[tenants]]
name = "acme"
keys = ["acme-secret", "sha256:{hash}"]
adapters = ["sql", "support-*"]
limits = {{ requests_per_minute = 60, tokens_per_minute = 100000, concurrent_requests = 8 }}

[[adapters]]
name = "support-*"
limits = {{ concurrent_requests = 16 }}
"""


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    second = hashlib.sha256(b"second").hexdigest()
    from_toml = read(written(tmp_path, TOML.format(hash=second.upper()), "tenants.toml"))
    (acme,) = from_toml.tenants
    assert from_toml.by_hash() == {key_hash("acme-secret"): acme, second: acme}
    assert [acme.may_use(name) for name in ("sql", "sql2", "support-", "support-x", "supportx", "SQL", "")] == [
        *(True, False, True, True, False, False, False)
    ]
    assert acme.limits == Limits(requests_per_minute=60, tokens_per_minute=100000, concurrent_requests=8)
    assert from_toml.limits_of_adapter("support-x") == Limits(concurrent_requests=16)
    assert from_toml.limits_of_adapter("sql") == Limits()
    assert read(written(tmp_path, msgspec.json.encode(from_toml).decode())) == from_toml
    assert tenants_file(str(tmp_path / "tenants.toml")) == str((tmp_path / "tenants.toml").resolve())


KEY = "a-key-that-no-message-tells"
ONE = {"name": "a", "keys": [KEY]}
BAD: dict[str, Any] = {
    "is no tenants' file": "{",
    "unknown field `adapter`": {"tenants": [ONE | {"adapter": []}]},
    "length >= 1": {"tenants": [{"name": "a", "keys": []}]},
    ">= 1 - at `\\$.tenants\\[0\\].limits.tokens_per_minute`": {
        "tenants": [ONE | {"limits": {"tokens_per_minute": 0}}]
    },
    "`int \\| null`, got `float`": {"tenants": [ONE | {"limits": {"requests_per_minute": 1.5}}]},
    "two of tenants have the name 'a'": {"tenants": [ONE, {"name": "a", "keys": ["l"]}]},
    "two of adapters have the name 'x'": {"adapters": [{"name": "x", "limits": {}}] * 2},
    "tenants have the name ' '": {"tenants": [ONE | {"name": " "}]},
    "tenants have the name '\\(operator\\)'": {"tenants": [ONE | {"name": "(operator)"}]},
    "also to 'b'": {"tenants": [ONE, {"name": "b", "keys": [KEY]}]},
    "also to 'b': give": {"tenants": [ONE, {"name": "b", "keys": [f"sha256:{key_hash(KEY)}"]}]},
    "keys\\[1\\] is sha256: without 64": {"tenants": [{"name": "a", "keys": [KEY, "sha256:abc"]}]},
    "keys\\[0\\] is empty, or has spaces": {"tenants": [{"name": "a", "keys": [f"{KEY} "]}]},
    "not printable ASCII": {"tenants": [{"name": "a", "keys": [""]}]},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_one_clear_error_that_tells_no_key(tmp_path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(written(tmp_path, BAD[message]))
    assert KEY not in str(error.value)
    assert key_hash(KEY) not in str(error.value)


def test_a_file_that_is_not_there_or_of_another_kind_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"is neither a \.toml nor a \.json file"):
        read(tmp_path / "tenants.yaml")
