"""Counts what is used up of a quota per minute."""

from __future__ import annotations

import math

SECONDS = 60.0
# What rounding may cost: far less than one of anything that is counted.
_ROUNDING = 1e-6


class Bucket:
    """A leaky bucket: what was charged drains away, a whole quota in a minute.

    So a quota can be used at once, and then as fast as it drains. A charge may go beyond the quota, as the tokens of an
    answer do, and is waited for afterwards: over any time, no more is begun than the quota, what drained, and the one
    charge that went beyond. The clock is the caller's: seconds that never go back.
    """

    def __init__(self) -> None:
        self._used = 0.0
        self._seen_at = 0.0

    def used(self, quota: int, now: float) -> float:
        """What is used up of ``quota`` a minute at ``now``."""
        drained = (now - self._seen_at) * quota / SECONDS
        self._used, self._seen_at = max(0.0, self._used - drained), now
        return self._used

    def wait_s(self, quota: int, now: float) -> int:
        """Whole seconds until one more may begin; 0 where it may now."""
        excess = self.used(quota, now) + 1 - quota
        return 0 if excess <= _ROUNDING else math.ceil(excess * SECONDS / quota - _ROUNDING)

    def charge(self, amount: int, quota: int, now: float) -> None:
        """Use ``amount`` up, however much there is."""
        self._used = self.used(quota, now) + amount
