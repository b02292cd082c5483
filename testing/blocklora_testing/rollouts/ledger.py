"""Which version of a name may answer a request, from when it was sent to when it was answered."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Update:
    """Contents that a name has from some moment between ``sent`` and ``ready`` (None: the answer has not come)."""

    contents: str
    sent: float
    ready: float | None = None


@dataclass
class Ledger:
    """``contents`` of every version that was ever told, and the updates of every name in order."""

    contents: dict[str, str] = field(default_factory=dict)
    updates: dict[str, list[Update]] = field(default_factory=dict)

    def coming(self, name: str, contents: str, now: float) -> Update:
        """An update is about to be sent."""
        update = Update(contents=contents, sent=now)
        self.updates.setdefault(name, []).append(update)
        return update

    def failed(self, name: str, update: Update) -> None:
        """An update was refused."""
        self.updates[name].remove(update)

    def told(self, version: str, contents: str) -> str | None:
        """Contents have this version. What is wrong with that, or None."""
        if self.contents.setdefault(version, contents) != contents:
            return f"version {version} of {contents} is that of {self.contents[version]} too"
        return None

    def possible(self, name: str, begin: float, end: float) -> set[str]:
        """Contents that may answer a request for ``name`` that was sent at ``begin`` and answered at ``end``."""
        updates = self.updates.get(name, [])
        nexts: list[Update | None] = [*updates[1:], None]
        return {
            update.contents
            for update, after in zip(updates, nexts, strict=True)
            if update.sent <= end and (after is None or after.ready is None or after.ready >= begin)
        }
