"""Lets requests begin within the limits of their tenant and of their adapters, and counts what they use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from sglang_blocklora.tenancy.buckets import Bucket
from sglang_blocklora.tenancy.file import NO_LIMITS, Limits, Tenant, Tenants

# Nobody knows when a request ends.
CONCURRENT_WAIT_S = 1
# So many accounts are kept before those that tell nothing are looked for.
KEPT_ACCOUNTS = 1000


class QuotaExceeded(Exception):
    """A request that may begin later.

    limit          the field of ``Limits`` that it meets; of several, the one that is waited for longest
    retry_after_s  whole seconds after which it may begin, if nobody else does until then
    """

    def __init__(self, owner: str, limit: str, quota: float, retry_after_s: int) -> None:
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(f"{owner} is at its limit of {quota} {_words(limit)}. Try again in {retry_after_s} s.")


class NeverFits(ValueError):
    """A request that is larger than a limit, whenever it begins."""


@dataclass
class Account:
    """What one tenant uses, or all who ask for one adapter.

    owner    in the words of a message
    running  prompts, times answers, that have begun and not ended
    slots    slots that these may come to need, as far as that is known
    """

    owner: str
    limits: Limits
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)
    running: int = 0
    slots: int = 0

    def waits(self, count: int, total_slots: int, now: float) -> Iterator[tuple[int, str, float]]:
        """(seconds, limit, quota) of each limit that keeps ``count`` of them from beginning now."""
        for limit, bucket in (("requests_per_minute", self.requests), ("tokens_per_minute", self.tokens)):
            quota = getattr(self.limits, limit)
            if quota is not None and (wait := bucket.wait_s(quota, now)):
                yield wait, limit, quota
        quota = self.limits.concurrent_requests
        if quota is not None and self.running + count > quota:
            yield CONCURRENT_WAIT_S, "concurrent_requests", quota
        share = self.limits.share_of_slots
        if share is not None and self.slots + 1 > share * total_slots:
            yield CONCURRENT_WAIT_S, "share_of_slots", share

    def begin(self, count: int, now: float) -> None:
        """``count`` of them begin."""
        self.running += count
        if self.limits.requests_per_minute is not None:
            self.requests.charge(count, self.limits.requests_per_minute, now)

    def charge_tokens(self, count: int, now: float) -> None:
        """Tokens of a prompt, or generated ones."""
        if self.limits.tokens_per_minute is not None:
            self.tokens.charge(count, self.limits.tokens_per_minute, now)

    def tells_nothing(self, now: float) -> bool:
        """Whether a new account would be the same."""
        buckets = ((self.requests, self.limits.requests_per_minute), (self.tokens, self.limits.tokens_per_minute))
        return not self.running and not any(quota and bucket.used(quota, now) for bucket, quota in buckets)


class Charge:
    """A request that has begun: its tokens are charged as they become known, also after its end.

    tenant  None: the operator
    """

    def __init__(
        self,
        tenant: Tenant | None,
        of_tenant: Account | None,
        of_adapters: Mapping[str, Account],
        counts: Mapping[str | None, int],
        clock: Callable[[], float],
    ) -> None:
        self.tenant = tenant
        self._of_tenant = of_tenant
        self._of_adapters = of_adapters
        self._clock = clock
        self._running = [(account, counts[adapter]) for adapter, account in of_adapters.items()]
        if of_tenant is not None:
            self._running.append((of_tenant, sum(counts.values())))
        self._slots: list[tuple[Account, int]] = []
        self._has_ended = False
        now = clock()
        for account, count in self._running:
            account.begin(count, now)

    def tokens(self, adapter: str | None, count: int) -> None:
        """Charge tokens of a prompt for ``adapter`` (None: the base model), or tokens that it generated."""
        now = self._clock()
        for account in self._accounts_of(adapter):
            account.charge_tokens(count, now)

    def reserve(self, adapter: str | None, slots: int) -> None:
        """Until the end ``slots`` more may be needed; a request that has ended needs none."""
        for account in () if self._has_ended else self._accounts_of(adapter):
            account.slots += slots
            self._slots.append((account, slots))

    def end(self) -> None:
        """Nothing of it runs any more; told twice it counts once."""
        if not self._has_ended:
            self._has_ended = True
            for account, count in self._running:
                account.running -= count
            for account, slots in self._slots:
                account.slots -= slots

    def _accounts_of(self, adapter: str | None) -> list[Account]:
        found = [self._of_tenant, self._of_adapters.get(adapter) if adapter is not None else None]
        return [account for account in found if account is not None]


class Quotas:
    """The accounts of tenants and adapters that have limits. Of one event loop: not safe for threads.

    tenants      the limits; others may take their place: what was used counts on, and nobody who runs is stopped
    total_slots  of the KV caches of all replicas
    clock        seconds that never go back
    """

    def __init__(self, tenants: Tenants, total_slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.tenants = tenants
        self._total_slots = total_slots
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._look_beyond = KEPT_ACCOUNTS

    def begin(self, tenant: Tenant | None, counts: Mapping[str | None, int]) -> Charge:
        """Let a request begin, or charge nothing.

        tenant  None: the operator, who has no limits of its own
        counts  adapter (None: the base model) -> its prompts in the request, times the answers that each shall have
        Raises ``QuotaExceeded`` and ``NeverFits``.
        """
        now = self._clock()
        of_tenant = None if tenant is None else self._account("tenant", tenant.name, tenant.limits, now)
        of_adapters = {
            name: account
            for name in counts
            if name is not None
            and (account := self._account("adapter", name, self.tenants.limits_of_adapter(name), now)) is not None
        }
        asked = [(account, counts[name]) for name, account in of_adapters.items()]
        if of_tenant is not None:
            asked.append((of_tenant, sum(counts.values())))
        for account, count in asked:
            at_once = account.limits.concurrent_requests
            if at_once is not None and count > at_once:
                raise NeverFits(
                    f"The request asks for {count} answers at once, and {account.owner} may have {at_once} "
                    f"{_words('concurrent_requests')}. Send fewer in one request."
                )
        waits = [
            (*wait, account.owner) for account, count in asked for wait in account.waits(count, self._total_slots, now)
        ]
        if waits:
            seconds, limit, quota, owner = max(waits)
            raise QuotaExceeded(owner, limit, quota, seconds)
        return Charge(tenant, of_tenant, of_adapters, counts, self._clock)

    @property
    def running(self) -> dict[str, tuple[int, int]]:
        """Owner of an account -> what has begun and not ended, and the slots for it, where there is any."""
        found = {owner: (account.running, account.slots) for owner, account in self._accounts.items()}
        return {owner: used for owner, used in found.items() if any(used)}

    def _account(self, kind: str, name: str, limits: Limits, now: float) -> Account | None:
        if limits == NO_LIMITS:
            return None
        owner = f"{kind} {name!r}"
        account = self._accounts.get(owner)
        if account is None:
            self._forget(now)
            account = self._accounts[owner] = Account(owner, limits)
        account.limits = limits
        return account

    def _forget(self, now: float) -> None:
        """Names that nobody has are asked for as well: drop accounts of long ago, at a cost that does not grow."""
        if len(self._accounts) >= self._look_beyond:
            self._accounts = {name: one for name, one in self._accounts.items() if not one.tells_nothing(now)}
            self._look_beyond = max(KEPT_ACCOUNTS, 2 * len(self._accounts))


def _words(limit: str) -> str:
    return limit.replace("_", " ")
