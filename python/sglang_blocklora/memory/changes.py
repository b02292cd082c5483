"""Tells whether a prefix that was looked up in the radix tree could be longer or shorter now."""

from __future__ import annotations

# Namespaces that are remembered one by one; all are taken for changed when there are more.
MOST_NAMESPACES = 4096


class Changes:
    """What happened to the tree, counted: no clock but the order of calls.

    now  the number of the last change
    """

    def __init__(self) -> None:
        self.now = 0
        self._added: dict[str | None, int] = {}
        self._all_added = 0
        self._removed = 0

    def added(self, content_hash: str | None) -> None:
        """KV came in under an adapter's contents, or under the base model (None)."""
        self.now += 1
        self._added[content_hash] = self.now
        if len(self._added) > MOST_NAMESPACES:
            self._added.clear()
            self._all_added = self.now

    def removed(self) -> None:
        """Something went."""
        self.now += 1
        self._removed = self.now

    def concern(self, content_hash: str | None, found_tokens: int, since: int) -> bool:
        """Whether a prefix of which ``found_tokens`` were found at ``since`` may match otherwise now."""
        added = self._added.get(content_hash, self._all_added)
        return added > since or (found_tokens > 0 and self._removed > since)
